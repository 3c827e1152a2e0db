"""The morning report in a real browser: Chromium without a window, with keys and a pointer as a person has them."""

import io
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image
from test_report import report, run_folder
from test_report_server import picks_of, serving

from dailies.jobs.bench.chromium import Browser, NoBrowser
from dailies.jobs.bench.report import PICTURES_SEEN
from dailies.pipeline.run.ledger import read, write_again
from dailies.pipeline.run.picks import Picks, read_picks, write_picks

HOSTILE = ['<img src=x onerror="window.hacked=1">', "</script><script>window.hacked=1</script>",
           "javascript:window.hacked=1", "{{constructor}} ${window.hacked=1}", "\u202eevil \u0000\u0007",
           "a fox in snow", "a fox in rain", "a fox in rain", "a hare"]
BEGUN = "document.body.classList.contains('begun')"


@pytest.fixture(scope="module")
def browser():
    try:
        with Browser(1200, 800) as browser:
            yield browser
    except NoBrowser as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    folder = tmp_path_factory.mktemp("night") / "out"
    run_folder(folder, clips=8, failed=1, prompts=HOSTILE)
    return folder


@pytest.fixture
def page(browser, night, capsys):
    """The report from the disk, without a decision; no test may leave an error in the console."""
    report(capsys, night)
    open_page(browser, f"file://{night}/report/index.html")
    browser.run("localStorage.clear()")
    browser.events.clear()
    open_page(browser, f"file://{night}/report/index.html")
    yield browser
    assert browser.complaints() == []


def open_page(browser, address):
    browser.open(address, until=BEGUN)


def keys(browser, *pressed):
    for key in pressed:
        browser.key(key)


def shown(browser):
    """ids of the view, in order."""
    return browser.run("[...dailies.query.view].map(index => dailies.here(index).id)")


def asked(browser, script):
    """Does something, and waits for what it asks for."""
    browser.run(f"({script}, dailies.controls.again())")


def figures(browser):
    """Each value above the contact sheet, and what it is of."""
    return [tuple(pair) for pair in browser.run("[...document.querySelectorAll('#figures div')].map(each => "
                                                "['dd', 'dt'].map(name => each.querySelector(name).textContent))")]


def tiles(browser):
    return browser.run("document.querySelectorAll('.tile:not(.waits)').length")


def pixels(browser, selector):
    box = browser.run(f"(box => [box.x, box.y, box.width, box.height])(document.querySelector({selector!r})"
                      ".getBoundingClientRect())")
    image = Image.open(io.BytesIO(browser.picture())).convert("RGB")
    x, y, width, height = map(round, box)
    return np.asarray(image.crop((x + 4, y + 4, x + width - 4, y + height - 4))).astype(float)


def test_it_opens_from_a_disk_and_asks_nobody(page, night):
    assert tiles(page) == 9 and page.run("document.title") == "out · dailies"
    assert figures(page)[0] == ("8", "clips done")
    time.sleep(0.2)
    seen = page.requested()
    assert len(seen) > 20 and [address for address in seen if not address.startswith(f"file://{night}/")] == []
    posters = page.run("[...document.querySelectorAll('.picture')].map(each => each.style.backgroundImage)")
    assert len(posters) == 8 and all("../posters/" in poster for poster in posters)
    picture = pixels(page, ".picture")
    assert picture.std() > 20 and picture.mean() > 40


def test_a_hostile_prompt_stays_text(page):
    captions = page.run("[...document.querySelectorAll('.tile p')].map(each => each.textContent)")
    assert captions == HOSTILE
    assert page.run("document.querySelectorAll('.tile img, .tile script, img[src=x]').length") == 0
    keys(page, "ArrowRight", "Enter")
    page.wait("!document.querySelector('#viewer').hidden")
    assert page.run("document.querySelector('#prompt').textContent") == HOSTILE[0]
    keys(page, "s")
    page.wait("document.querySelector('.stage.abreast')")
    keys(page, "s", "Escape", "g")
    page.wait("document.querySelector('.heading')")
    assert HOSTILE[0] in page.run("document.querySelector('.heading').textContent")
    keys(page, "g")
    assert page.run("typeof window.hacked") == "undefined"


def test_words_filters_and_sorts_choose_what_is_shown(page):
    page.run("document.querySelector('#search').focus()")
    page.type("FOX rain")
    page.wait("dailies.query.view.length === 2")
    assert shown(page) == ["row-6", "row-7"]
    page.run("dailies.controls.clear()")
    asked(page, "dailies.query.wanted.filters = [{column: 'user.mood', how: '=', value: 'loud'}]")
    assert shown(page) == ["row-1", "row-3", "row-5", "row-7"]
    asked(page, "dailies.query.wanted.filters.push({column: 'quality.motion', how: '>=', value: '1.5'})")
    assert shown(page) == ["row-5", "row-7"]
    asked(page, f"dailies.query.wanted.filters = [{{column: 'seed', how: '>=', value: '{2**62 + 7}'}}]")
    assert shown(page) == ["row-7", "row-8"]             # whole numbers that are larger than JavaScript's
    asked(page, "dailies.query.wanted.filters = [{column: 'finished_at', how: '<=', value: '2026-11-29T22:00:40Z'}]")
    assert shown(page) == ["row-0", "row-1"]
    asked(page, "Object.assign(dailies.query.wanted, {filters: [], sort: 'user.score', descending: true})")
    assert shown(page) == [f"row-{number}" for number in range(8, -1, -1)]
    asked(page, "Object.assign(dailies.query.wanted, {sort: 'quality.motion', descending: false})")
    assert shown(page)[-1] == "row-8"                   # what was not measured comes last
    asked(page, "Object.assign(dailies.query.wanted, {sort: '', shown: 'failed'})")
    assert shown(page) == ["row-8"]
    columns = page.run("[...document.querySelectorAll('#sort option')].map(each => each.value)")
    assert {"quality.motion", "user.mood", "finished_at", "prompt", "id", "worker"} <= {*columns}


def test_a_column_that_cannot_be_fetched_is_told_and_asked_for_again(page, night):
    name = page.run("dailies.columns.get('quality.motion').files[0]")
    file = night / "report" / name
    content = file.read_bytes()
    choose = ("(select => { select.value = 'quality.motion'; select.dispatchEvent(new Event('change')); })"
              "(document.querySelector('#sort'))")
    file.unlink()
    try:
        page.run(choose)
        page.wait(f"document.querySelector('#toast').innerText.includes('{name} cannot be loaded')")
        assert page.run("document.querySelector('#said').textContent").startswith(name)
        assert not page.run("document.body.classList.contains('asking')")
        assert len(page.complaints()) == 1 and "ERR_FILE_NOT_FOUND" in page.complaints()[0]
    finally:
        file.write_bytes(content)
    page.events.clear()
    page.run("document.querySelector('#direction').click()")
    page.run(choose)
    page.wait("dailies.here(dailies.query.view[0]).id === 'row-7'")


def test_a_filter_can_be_made_with_the_form(page):
    page.run("document.querySelector('#add-filter').click()")
    page.run("(select => { select.value = 'user.mood'; select.dispatchEvent(new Event('change')); })"
             "(document.querySelector('#filter-column'))")
    offered = page.run("[...document.querySelectorAll('#filter-values option')].map(each => each.value)")
    assert offered == ["calm", "loud"]
    page.run("document.querySelector('#filter-value').focus()")
    page.type("calm")
    page.key("Enter")
    page.wait("dailies.query.view.length === 5")
    assert page.run("document.querySelector('#filters').innerText") == "mood contains calm ×"
    page.run("document.querySelector('#filters button').click()")
    page.wait("dailies.query.view.length === 9")


def test_keys_decide_survive_a_reload_and_leave_as_one_file(page, night, tmp_path):
    keys(page, "ArrowRight", "p", "x", "r", "p", "u", "ArrowDown")
    keys(page, "Home", "Enter", "n")
    page.type("more snow")
    keys(page, "Escape", "Escape")
    page.wait("document.querySelector('#viewer').hidden")
    marks = [mark or "" for mark in page.run("[...document.querySelectorAll('.tile')].map(t => t.dataset.decision)")]
    assert marks[:5] == ["pick", "reject", "redo", "", ""]
    open_page(page, f"file://{night}/report/index.html")
    assert page.run("[...document.querySelectorAll('.tile')].map(t => t.dataset.decision)") == marks
    assert page.run("document.querySelector('#judged-text').textContent") == "1 picked, 1 rejected, 1 to redo"
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.run("document.querySelector('#save').click()")
    end = time.monotonic() + 20
    while not (found := list(tmp_path.glob("picks.json"))) and time.monotonic() < end:
        time.sleep(0.05)
    picks = Picks.parsed(found[0].read_bytes())
    decided = {pick.id: (pick.decision, pick.note) for pick in picks.picks if pick.decision or pick.note}
    assert decided == {"row-0": ("pick", "more snow"), "row-1": ("reject", ""), "row-2": ("redo", "")}
    assert {(pick.seed - 2**62, pick.clip_id) for pick in picks.picks} >= {(0, f"{1:064x}"), (2, f"{3:064x}")}


def test_a_browser_that_keeps_nothing_shows_the_page_and_says_so(page, night):
    """As one whose owner lets no page keep data."""
    refused = ("Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); "
               "}})")
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source=refused)["identifier"]
    try:
        open_page(page, f"file://{night}/report/index.html")
        assert tiles(page) == 9
        assert "keeps nothing of a page: download the picks" in page.run("document.querySelector('#toast').innerText")
        keys(page, "ArrowRight", "p")
        assert page.run("document.querySelector('#judged-text').textContent") == "1 picked, 0 rejected, 0 to redo"
        assert not page.run("document.querySelector('#save').disabled")
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_what_was_decided_of_a_clip_that_another_take_replaced_is_counted_no_more(browser, tmp_path, capsys):
    store = run_folder(tmp_path / "out", clips=2, failed=0)
    said, address = "document.querySelector('#judged-text').textContent", f"file://{tmp_path}/out/report/index.html"
    report(capsys, tmp_path / "out")
    browser.events.clear()
    open_page(browser, address)
    browser.run("localStorage.clear()")
    open_page(browser, address)
    keys(browser, "ArrowRight", "r", "p")
    assert browser.run(said) == "1 picked, 0 rejected, 1 to redo"
    rows = read(store)
    write_again(store, rows.filter(pc.equal(rows["id"], "row-0")), lambda row: {
        "seed": 7, "take_of": row["seed"], "clip_id": "7" * 64, "replaces": row["clip_id"]})
    report(capsys, tmp_path / "out")
    open_page(browser, address)
    browser.wait(f"{said} === '1 picked, 0 rejected, 0 to redo'")
    assert browser.complaints() == []


def test_what_was_decided_here_is_a_column_like_others(page):
    """Though the run folder knows of none of it."""
    keys(page, "ArrowRight", "p", "x", "r", "Home", "Enter", "n")
    page.type("more snow")
    page.run("document.querySelector('#note').value += '\\ud83e'")      # half a character
    keys(page, "Escape", "Escape")
    offered = page.run("[...document.querySelectorAll('#filter-column option')].map(each => each.value)")
    assert {"decision", "note"} <= {*offered}
    asked(page, "dailies.query.wanted.filters = [{column: 'decision', how: '!=', value: 'pick'},"
                " {column: 'decision', how: 'has', value: 're'}]")
    assert shown(page) == ["row-1", "row-2"]
    asked(page, "Object.assign(dailies.query.wanted, {filters: [], sort: 'note'})")
    assert shown(page)[0] == "row-0"
    assert page.run("dailies.decisions.of(dailies.here(0)).note") == "more snow\ufffd"


def test_a_key_plays_the_clip_and_its_pixels_are_not_black(page):
    keys(page, "ArrowRight")
    plays(page)
    keys(page, "m", " ")
    assert page.run("(v => v.paused && v.muted)(document.querySelector('video'))")
    keys(page, "ArrowRight", "m", "Escape")


def test_it_opens_and_plays_wherever_a_plain_web_server_has_it(browser, tmp_path, capsys):
    """One that knows no ranges, as `python -m http.server`."""
    run_folder(tmp_path / "out", clips=2, failed=0)
    report(capsys, tmp_path / "out")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_address[1]}/out/"
        try:
            opens_and_plays(browser, place + "report/", (place,))
        finally:
            server.shutdown()


@pytest.mark.parametrize("lies", ["in a bucket that everybody reads", "in a bucket, its links signed",
                                  "on a disk, its links signed"])
def test_a_report_of_a_bucket_opens_and_plays(browser, s3_server, s3_bucket, tmp_path, capsys, lies):
    store = run_folder(f"{s3_bucket}/my runs/31", clips=2, failed=0)
    bucket = s3_bucket.removeprefix("s3://")
    place, clips = s3_server.open_to_all(bucket) + "/my%20runs/31/", f"{s3_server.url}/{bucket}/my%20runs/31/"
    if "everybody" in lies:
        report(capsys, store.uri)
        opens_and_plays(browser, place + "report/index.html", (place,))
    elif "disk" in lies:
        report(capsys, store.uri, "--to", tmp_path / "here", "--presign", "12h")
        opens_and_plays(browser, f"file://{tmp_path}/here/index.html", (f"file://{tmp_path}/here/", clips))
    else:
        report(capsys, store.uri, "--presign", "12h")
        opens_and_plays(browser, place + "report/index.html", (place + "report/", clips))


def opens_and_plays(browser, address, places):
    """places: of all that it asks for."""
    browser.events.clear()
    open_page(browser, address)
    browser.wait("document.querySelectorAll('.tile:not(.waits)').length === 2")
    browser.run(PICTURES_SEEN)
    time.sleep(0.2)
    shown = pixels(browser, ".picture")
    assert shown.std() > 20 and shown.mean() > 40
    keys(browser, "ArrowRight")
    plays(browser)
    keys(browser, "Escape")
    assert browser.complaints() == []
    asked = [url for url in browser.requested() if url != "about:blank"]
    assert {place for place in places if any(url.startswith(place) for url in asked)} == {*places}
    assert [url for url in asked if not url.startswith(places)] == []
    assert any("/clips/" in url for url in asked) and any("/posters/" in url for url in asked)


def plays(browser):
    keys(browser, "Enter", " ")
    browser.wait("document.querySelector('video.ready') && document.querySelector('video').currentTime > 0.1")
    assert browser.run("(v => !v.paused && !v.muted && v.videoWidth === 64)(document.querySelector('video'))")
    browser.run("document.querySelector('.stage .picture').style.visibility = 'hidden'")    # the clip, not its poster
    time.sleep(0.2)
    picture = pixels(browser, "video")
    assert picture.mean() > 40 and picture.std() > 20


def test_tab_stays_in_an_open_viewer_and_a_swipe_goes_on(page):
    keys(page, "ArrowRight", "Enter")
    stops = []
    for _ in range(9):                                  # eight, and the first again
        page.key("Tab")
        stops.append(page.run("(each => each.closest('#viewer') && (each.id || each.dataset.decision))"
                              "(document.activeElement)"))
    assert stops == ["close", "beside", "sound", "pick", "reject", "redo", "undo", "note", "close"]
    place = "document.querySelector('#place').textContent"
    assert page.run(place) == "1 of 9"
    for start, end, said in ((400, 300, "2 of 9"), (400, 380, "2 of 9"), (300, 400, "1 of 9")):    # 20 pixels are none
        page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": start, "y": 300}])
        page.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": end, "y": 300}])
        page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        page.wait(f"{place} === '{said}'")
    keys(page, "Escape")


def test_the_pointer_plays_the_strip(page):
    x, y = page.run("(box => [box.x + box.width / 2, box.y + box.height / 2])"
                    "(document.querySelector('.frame').getBoundingClientRect())")
    page.move(x, y)
    page.wait("document.querySelector('.picture').style.backgroundSize === '400% 300%'")
    page.wait("document.querySelector('.picture').style.backgroundPosition.startsWith('100%')")
    page.move(5, 5)
    page.wait("document.querySelector('.picture').style.backgroundSize === '200% 150%'")


def test_rows_of_one_prompt_stand_side_by_side_also_of_two_runs(page, night, tmp_path, capsys):
    run_folder(tmp_path / "old", clips=8, prompts=HOSTILE)
    report(capsys, night, "--beside", tmp_path / "old", "--to", tmp_path / "both")
    open_page(page, f"file://{tmp_path}/both/index.html")
    asked(page, "dailies.query.wanted.words = 'fox in rain'")
    keys(page, "ArrowRight", "s")
    page.wait("document.querySelectorAll('.shot').length === 4")
    assert page.run("[...document.querySelectorAll('figcaption')].map(each => each.textContent)") == [
        "row-6 · seed 4611686018427387910", "row-7 · seed 4611686018427387911",
        "old · row-6 · seed 4611686018427387910", "old · row-7 · seed 4611686018427387911"]
    current = page.run("[...document.querySelectorAll('.shot')].map(each => each.getAttribute('aria-current'))")
    assert current == ["true", "false", "false", "false"]
    keys(page, "x", "p", "p")                           # the last is of the other run: it is judged in its own report
    decisions = page.run("[...document.querySelectorAll('.shot')].map(each => each.dataset.decision)")
    assert decisions == ["reject", "pick", "", ""]
    assert "own report" in page.run("document.querySelector('#toast').innerText")
    keys(page, " ")
    page.wait("document.querySelectorAll('video.ready').length === 4")
    assert page.run("[...document.querySelectorAll('video')].filter(each => !each.muted).length") == 1
    keys(page, "Escape")


def test_decisions_of_a_served_page_go_straight_into_the_run_folder(browser, tmp_path):
    run_folder(tmp_path / "out", clips=3, prompts=HOSTILE)
    with serving(tmp_path / "out") as server:
        browser.events.clear()
        open_page(browser, server.address)
        keys(browser, "ArrowRight", "p", "r", "Enter", " ")
        browser.wait("document.querySelector('video.ready') && document.querySelector('video').currentTime > 0.05")
        browser.wait("document.querySelector('#save').textContent === 'Saved'")
        said = {row["id"]: row["decision"] for row in read_picks(server.sources[0].store).to_pylist()}
        assert said == {"row-0": "pick", "row-1": "redo"}
        server.made_at -= 1e6
        browser.run("localStorage.clear()")
        open_page(browser, server.address)
        assert browser.run("[...document.querySelectorAll('.tile')].map(t => t.dataset.decision)") == [
            "pick", "redo", "", ""]
        said = "document.querySelector('#judged-text').textContent"
        browser.wait(f"{said} === '1 picked, 0 rejected, 1 to redo'")      # though this browser knows of none
        keys(browser, "ArrowRight", "x")
        assert browser.run(said) == "0 picked, 1 rejected, 1 to redo"
        browser.wait("document.querySelector('#save').textContent === 'Saved'")
        later = (datetime.now(UTC) + timedelta(seconds=60)).isoformat().encode()
        data = picks_of((0, "redo")).replace(b"2026-11-30T08:00:00Z", later)
        write_picks(server.sources[0].store, Picks.parsed(data))
        server.made_at -= 1e6
        open_page(browser, server.address)                  # what somebody else decided later counts here too
        assert browser.run("document.querySelector('.tile').dataset.decision") == "redo"
        browser.wait(f"{said} === '0 picked, 0 rejected, 2 to redo'")
        assert browser.complaints() == []
        asked_of = {address.partition(server.token)[0] for address in browser.requested()} - {"about:blank"}
        assert asked_of == {f"http://127.0.0.1:{server.server_address[1]}/"}


def test_a_screen_reader_has_a_name_for_everything(page):
    keys(page, "ArrowRight", "p")
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in tree}
    nameless = [node["role"]["value"] for node in tree if not node.get("ignored") and node["role"]["value"] in (
        "button", "option", "textbox", "searchbox", "combobox", "radio", "tab", "dialog", "listbox", "tabpanel")
        and not node.get("name", {}).get("value")]
    assert nameless == [] and {"option", "listbox", "tab", "searchbox", "group"} <= roles
    names = [node["name"]["value"] for node in tree if node["role"]["value"] == "option" and "name" in node]
    assert any(name.endswith("picked") for name in names) and any(name.endswith("Failed") for name in names)


def test_a_screen_reader_has_options_alone_in_the_sheet_and_hears_which_buttons_are_pressed(page):
    keys(page, "ArrowRight", "g")
    page.wait("document.querySelector('.heading')")
    tree = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    clips, = (node for node in tree if node["role"]["value"] == "listbox")
    assert {said["name"]: said["value"]["value"] for said in clips["properties"]}["multiselectable"]
    assert {node["role"]["value"] for node in tree if node["nodeId"] in clips["childIds"]} == {"option"}
    pressed = {node["name"]["value"]: said["value"]["value"] for node in tree for said in node.get("properties", ())
               if said["name"] == "pressed"}
    assert (pressed["All"], pressed["Picked"], pressed["Descending"], pressed["Group by prompt"]) == (
        "true", "false", "false", "true")
    keys(page, "g")


def test_a_phone_and_a_dark_room_have_their_own(page, night):
    page.run("document.querySelector('#theme').click()")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(19, 19, 21)"
    try:
        page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        page.wait("innerWidth === 390 && document.querySelector('.tile').getBoundingClientRect().width < 190")
        assert page.run("document.documentElement.scrollWidth") == 390
        page.run("document.querySelector('.tile').click()")
        page.wait("!document.querySelector('#viewer').hidden")
        low = page.run("Math.min(...[...document.querySelectorAll('.decide button')].map(b => innerHeight - "
                       "b.getBoundingClientRect().bottom))")
        assert low >= 0 and page.run("document.documentElement.scrollWidth") == 390
        keys(page, "Escape")
    finally:
        page.call("Emulation.setDeviceMetricsOverride", width=1200, height=800, deviceScaleFactor=1, mobile=False)


def test_the_night_says_what_failed_and_what_to_type(page, night):
    page.run("document.querySelector('#tab-night').click()")
    text = page.run("document.querySelector('#view-night').innerText")
    for said in ("WorkerDied", f"dailies retry {night} --where error_type=WorkerDied", "of the work", "$18.00",
                 "$16.00"):
        assert said in text
    page.run("[...document.querySelectorAll('.failures button')].at(-1).click()")
    page.wait("dailies.query.view.length === 1")
    assert shown(page) == ["row-8"]


@pytest.mark.parametrize("price", [None, 2.0])
def test_gpu_hours_are_counted_as_they_are_shown(page, price):
    said = "Object.assign(dailies.said.figures, {gpu_hours: %s, cost: %s}); dailies.night.figures(); 1"
    for hours, shown in ((1, "1 GPU hour"), (1.04, "1 GPU hour"), (0.997, "1 GPU hour"), (0.04, "0.04 GPU hours"),
                         (2.25, "2.3 GPU hours")):
        page.run(said % (hours, "null" if price is None else price * hours))
        assert " ".join(figures(page)[-1]).endswith(shown)


def test_a_night_that_has_made_nothing_says_so(browser, tmp_path, capsys):
    run_folder(tmp_path / "out", clips=0, failed=0)
    report(capsys, tmp_path / "out")
    browser.events.clear()
    open_page(browser, f"file://{tmp_path}/out/report/index.html")
    assert "Nothing here yet" in browser.run("document.querySelector('#empty').innerText")
    browser.run("document.querySelector('#tab-night').click()")
    assert "Nothing was made yet" in browser.run("document.querySelector('#view-night').innerText")
    assert browser.complaints() == []


def test_the_page_has_no_inline_script_and_names_no_other_place(night):
    from dailies.pipeline.report.writer import page_files
    files = page_files()
    html = files["index.html"].decode()
    assert "script-src 'self'" in html and "unsafe" not in html and "style=" not in html and " on" + "click" not in html
    assert html.count("<script src=") == html.count("<script")
    for name, data in files.items():
        text = data.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//" + "cdn" not in text, name
        assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write",
                                                 "eval(", "new Function")), name

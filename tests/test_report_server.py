"""What `dailies report --serve` gives and takes, and from whom."""

import http.client
import io
import json
import threading
from contextlib import contextmanager

import pytest
from test_report import run_folder

from dailies.jobs.cli import main
from dailies.jobs.report_server import ReportServer
from dailies.jobs.runs import open_run
from dailies.pipeline.report.writer import Source
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import clip_key, poster_key
from dailies.pipeline.run.ledger_row import COLUMNS
from dailies.pipeline.run.picks import read_picks

CLIP, POSTER = clip_key(f"{1:064x}"), poster_key(f"{1:064x}")


@contextmanager
def serving(*uris):
    server = ReportServer([Source(store=store, run=run) for store, run in map(open_run, map(str, uris))])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    run_folder(folder / "out")
    run_folder(folder / "old", clips=2)
    with serving(folder / "out", folder / "old") as server:
        server.folder = folder / "out"
        yield server


def ask(server, path, *, method="GET", body=None, token=None, host=None, **headers):
    """status, headers, body; headers: with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest(method, f"/{token or server.token}/{path}", skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_address[1]}")
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, data


def picks_of(*picks) -> bytes:
    return json.dumps({"format": 1, "picks": [
        {"id": f"row-{number}", "seed": 2**62 + number, "clip_id": f"{number + 1:064x}", "decision": decision,
         "note": "", "decided_at": "2026-11-30T08:00:00Z"} for number, decision in picks]}).encode()


def post(server, body, **headers):
    origin = f"http://127.0.0.1:{server.server_address[1]}"
    return ask(server, "report/picks", method="POST", body=body,
               **({"Origin": origin, "Content_Type": "application/json"} | headers))


def test_the_page_the_data_clips_and_posters_are_given(served):
    status, headers, body = ask(served, "report/")
    assert status == 200 and b'data-served="yes"' in body and headers["Content-Type"].startswith("text/html")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    status, headers, head = ask(served, "report/data/head.js?123")
    assert status == 200 and b'"base":"../beside/1/"' in head and headers["Content-Type"].startswith("text/javascript")
    page = json.loads(head[len(b"dailies.head("):-3])["sheet"]["pages"][0]
    assert ask(served, f"report/{page}")[0] == 200
    clip = (served.folder / CLIP).read_bytes()
    assert ask(served, CLIP)[2] == clip and ask(served, POSTER)[1]["Content-Type"] == "image/webp"
    assert ask(served, f"beside/1/{CLIP}")[2] == (served.folder.parent / "old" / CLIP).read_bytes()
    assert not (served.folder / "report").exists()       # nothing is written to show it


@pytest.mark.parametrize("asked, want", [
    ("bytes=0-9", (206, 0, 10)), ("bytes=5-", (206, 5, None)), ("bytes=-7", (206, -7, None)),
    ("bytes=0-999999999", (206, 0, None)), ("bytes=0-1,4-5", (200, 0, None)), ("lines=1-2", (200, 0, None))])
def test_a_clip_comes_in_the_range_that_is_asked_for(served, asked, want):
    clip = (served.folder / CLIP).read_bytes()
    status, headers, body = ask(served, CLIP, Range=asked)
    assert (status, body) == (want[0], clip[want[1]:want[2]]) and headers["Accept-Ranges"] == "bytes"
    if status == 206:
        start = want[1] % len(clip)
        assert headers["Content-Range"] == f"bytes {start}-{start + len(body) - 1}/{len(clip)}"
    assert ask(served, CLIP, method="HEAD", Range=asked)[2] == b""


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_a_pipe_has_the_address_at_once_and_ctrl_c_is_no_error(served, monkeypatch, options):
    pipe, seen = io.TextIOWrapper(io.BytesIO()), []

    def until_ctrl_c(server):
        seen.append((pipe.buffer.getvalue().decode(), server.address))
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout", pipe)
    monkeypatch.setattr(ReportServer, "serve_forever", until_ctrl_c)
    assert main(["report", str(served.folder), "--serve", *options]) == 0
    assert seen[0][1] in seen[0][0]


def test_a_range_behind_the_end_is_refused(served):
    assert ask(served, CLIP, Range="bytes=99999999-")[0] == 416


@pytest.mark.parametrize("path", [
    "run.json", "seal.key", "ledger/000001-000000.parquet", "clips/../run.json", "clips/%2e%2e/run.json", "../run.json",
    "clips/ab/x.mp4", f"clips/ff/{1:064x}.mp4", "report/../run.json", "report/data/../../run.json", "report/main.py",
    f"beside/9/{CLIP}", f"beside/1/../{CLIP}", "beside/1/run.json", "clips", "picks/x.parquet"])
def test_nothing_else_is_given(served, path):
    status, _, body = ask(served, path)
    assert status == 404 and b"identity" not in body


def test_who_does_not_know_the_token_or_comes_from_elsewhere_is_refused(served):
    port = served.server_address[1]
    for how in (dict(token="x"), dict(token=served.token[:-1]), dict(host="evil.example"),
                dict(host=f"evil.example:{port}"), dict(Origin="http://evil.example"), dict(Origin="null"),
                dict(Sec_Fetch_Site="cross-site"), dict(Sec_Fetch_Site="same-site")):
        for path in ("report/", CLIP):
            status, headers, body = ask(served, path, **how)
            assert status == 403 and b"<html" not in body and "nosniff" in headers["X-Content-Type-Options"]
        assert post(served, picks_of((0, "pick")), **how)[0] == 403
    assert ask(served, "report/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200     # a link
    without_origin = dict(method="POST", body=picks_of((0, "pick")), Content_Type="application/json")
    assert ask(served, "report/picks", **without_origin)[0] == 403
    assert read_picks(served.sources[0].store).num_rows == 0


def test_decisions_go_into_the_run_folder_and_come_back_with_the_page(served):
    body = picks_of((0, "pick"), (1, "redo"), (7, "pick"))       # the last of a row that this run does not have
    status, _, answer = post(served, body)
    assert status == 200 and json.loads(answer) == {"kept": 2}
    said = {row["id"]: row["decision"] for row in read_picks(served.sources[0].store).to_pylist()}
    assert said == {"row-0": "pick", "row-1": "redo"}
    assert [path.parent.name for path in served.folder.glob("picks/*.parquet")] == ["picks"]
    served.made_at -= 1e6
    _, _, head = ask(served, "report/data/head.js")
    assert b'"values":["pick","redo"]' in head


def test_a_decision_about_an_earlier_take_is_kept_as_well(tmp_path):
    store = run_folder(tmp_path / "out", clips=1)
    row = next(row for row in ledger.read(store, COLUMNS.names).to_pylist() if row["id"] == "row-0")
    with ledger.Ledger.open(store) as now:
        now.append([row | {"seed": 5, "take_of": row["seed"], "replaces": row["clip_id"], "clip_id": "e" * 64}])
    with serving(tmp_path / "out") as server:
        assert json.loads(post(server, picks_of((0, "reject")))[2]) == {"kept": 1}


@pytest.mark.parametrize("body, headers, want", [
    (b"{}", {}, 400), (b"[" * 100_000, {}, 400), (picks_of((0, "keep")), {}, 400), (b"", {}, 400),
    (picks_of((0, "pick")), dict(Content_Type="text/plain"), 415),
    (picks_of((0, "pick")), dict(Content_Length="99999999999"), 413),
    (picks_of((0, "pick")), dict(Content_Length="0" * 12 + "9" * 12), 413),
    (b"x", dict(Transfer_Encoding="chunked"), 411)],
    ids=str)
def test_what_is_no_decision_is_refused_with_a_sentence(served, body, headers, want):
    before = read_picks(served.sources[0].store).num_rows
    if "Content_Length" in headers:
        status, _, said = ask(served, "report/picks", method="POST", body=None, Content_Type="application/json",
                              Origin=f"http://127.0.0.1:{served.server_address[1]}", **headers)
    else:
        status, _, said = post(served, body, **headers)
    assert status == want and said and read_picks(served.sources[0].store).num_rows == before


def test_only_loopback_listens(served):
    assert served.server_address[0] == "127.0.0.1"


def test_a_bucket_is_served_in_ranges(s3_bucket):
    run_folder(f"{s3_bucket}/night", clips=1)
    with serving(f"{s3_bucket}/night") as server:
        clip = server.sources[0].store.get(CLIP)
        assert ask(server, CLIP)[2] == clip and ask(server, CLIP, Range="bytes=10-19")[2] == clip[10:20]
        assert ask(server, clip_key("f" * 64))[0] == 404

"""A served run: its answers are those of ``predict``, and nothing of a request is kept."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_servers import BOUNDARY, KIND, Answer, Server, form, large_png, make_run, png, read_raw

import featcache
from featcache.deployment.server import serving
from featcache.errors import ConfigError, FeatcacheWarning, RunError

NUM_FILES, NUM_REQUESTS, FILE_BYTES = 4, 4, 6 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("served"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FeatcacheWarning)
        featcache.decide(made / "run", positive="covid", recall=0.6, refer=0.3, say=lambda _: None)
        featcache.evaluate(made / "run", positive="covid", say=lambda _: None)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    limits = {
        "file_bytes": FILE_BYTES, "request_bytes": 2 * FILE_BYTES, "num_files": NUM_FILES,
        "num_requests": NUM_REQUESTS, "header_seconds": 4, "body_seconds": 8,
    }  # fmt: skip
    with Server(folder, **limits) as made:
        yield made
        assert made.process.poll() is None, made.said()
        assert "serve:" not in made.said(), made.said()  # no fault of its own


def images(folder: Path) -> list[tuple[str, bytes]]:
    """Return images of several kinds by their names."""
    noise = np.random.default_rng(5)
    files = [(p.name, p.read_bytes()) for p in sorted(folder.glob("data/test/*/*"))[::3]]
    deep = noise.integers(0, 65536, (40, 50), np.uint16)
    colour = noise.integers(0, 256, (40, 50, 4), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, options in (
        ("deep.png", Image.fromarray(deep), {}),
        ("alpha.png", Image.fromarray(colour), {}),
        ("turned.jpg", Image.fromarray(colour[..., :3]), {"exif": turned}),
        ("täuschend \u202eecht.tif", Image.fromarray(colour[..., :3]), {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[name[-3:]], **options)
        files.append((name, buffer.getvalue()))
    return files


def assert_error(answer: Answer, status: int, part: str = "") -> None:
    assert answer.status == status, answer
    assert set(answer.facts["error"]) == {"what", "expected", "found", "where", "hint"}
    assert "diagnosis" in answer.facts["notice"]
    assert part in json.dumps(answer.facts["error"])


def test_an_answer_equals_predict(folder: Path, server: Server, tmp_path: Path) -> None:
    good = images(folder)
    files = [good[0], ("broken.png", b"no image"), *good[1:]]
    for name, data in files:
        (tmp_path / name).write_bytes(data)
    paths = [tmp_path / name for name, _ in files]
    network = "python:tiny_network:build"
    wanted = featcache.predict(folder / "run", paths, backbone=network, device="cpu").as_dict()
    alone = [server.send(file) for file in good]
    together = [server.send(*files[i : i + NUM_FILES]) for i in range(0, len(files), NUM_FILES)]
    for answers in (alone, together):
        assert {answer.status for answer in answers} == {200}
        found = [row for answer in answers for row in answer.facts["predictions"]]
        assert [row.pop("path") for row in found] == [name for name, _ in good]
        for row, expected in zip(found, wanted["predictions"], strict=True):
            for key in ("probs", "prob"):  # another engine may add in another order
                np.testing.assert_allclose(row.pop(key), expected[key], atol=1e-6)
            assert row == {k: v for k, v in expected.items() if k not in {"path", "probs", "prob"}}
    failure = {"path": "broken.png", "reason": wanted["failures"][0]["reason"]}
    assert together[0].facts["failures"] == [failure]
    facts = {key: wanted[key] for key in ("classes", "task", "thresholds", "novelty")}
    assert facts.items() <= together[0].facts.items()
    assert "diagnosis" in together[0].facts["notice"]
    assert {row["decision"] for row in wanted["predictions"]} > {"refer"}


def test_what_is_sent_is_neither_written_nor_logged(server: Server) -> None:
    before = server.said()
    answer = server.send(("Doe_John_1950.png", large_png()))
    assert answer.status == 200
    assert_error(server.send(("Doe_John_1950.png", large_png()[:5_000_000])), 422)
    assert_error(server.send(("Doe_John_1950.png", b"")), 422, "empty")
    assert server.said() == before  # neither "WRITES", by the audit hook, nor a name


BOMB = png(50_000, 50_000)
REFUSED: dict[str, tuple[int, str, bytes, dict[str, str]]] = {
    "no image": (422, "no known image format", form(("a.png", b"nonsense")), KIND),
    "an empty file": (422, "empty", form(("a.png", b"")), KIND),
    "no file": (422, "one file or more", form(), KIND),
    "a bomb": (413, "50000 x 50000", form(("a.png", BOMB)), KIND),
    "a large file": (413, "bytes", form(("a.png", bytes(FILE_BYTES + 1))), KIND),
    "many files": (413, f"at most {NUM_FILES}", form(*[("a.png", b"x")] * (NUM_FILES + 1)), KIND),
    "no form": (415, "multipart/form-data", b"x=1", {}),
    "a cut-off form": (400, "cut off", form(("a.png", b"x"))[:-10], KIND),
    "no boundary": (400, "multipart", b"nonsense", {"Content-Type": "multipart/form-data"}),
    "a large request": (
        413, "bytes", form(*[("a.png", bytes(FILE_BYTES))] * 3), KIND,
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused(server: Server, kind: str, is_streamed: bool) -> None:
    status, part, body, headers = REFUSED[kind]
    blocks = (body[i : i + 65536] for i in range(0, len(body), 65536)) if is_streamed else body
    assert_error(server.ask("POST", "/predict", blocks, **headers), status, part)


def test_a_stream_without_end_is_refused_while_it_is_read(server: Server) -> None:
    def stream() -> Iterator[bytes]:
        yield form(("a.png", b""))[: -len(BOUNDARY) - 8]
        for _ in range(40):
            yield bytes(1 << 20)

    assert_error(server.ask("POST", "/predict", stream(), **KIND), 413)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/nonsense", {}, 404),
        ("GET", "/page/..%2fpage.html.jinja", {}, 404),
        ("PUT", "/predict", {}, 405),
        ("GET", "/predict", {}, 405),
        ("GET", "/openapi.json", {}, 404),
        ("GET", "/", {"Host": "evil.example"}, 421),
        ("GET", "/card", {"Host": "evil.example:8000"}, 421),
        ("POST", "/predict", {"Host": ""}, 421),
        ("POST", "/predict", {"Origin": "http://evil.example"}, 403),
        ("POST", "/predict", {"Origin": "null"}, 403),
    ],
)
def test_other_sites_and_other_routes_are_refused(
    server: Server, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    assert_error(server.ask(method, path, **headers), status)


def test_it_is_called_by_addresses_and_by_its_own_names(server: Server) -> None:
    port = server.port
    for host in (f"localhost:{port}", "LOCALHOST.", "[::1]:8000", "192.168.1.5", "127.0.0.1"):
        answer = server.ask("GET", "/health", Host=host)
        assert (answer.status, answer.facts["status"]) == (200, "ok")
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    origin = f"http://127.0.0.1:{port}"
    assert server.ask("GET", "/", Origin=origin, Host=f"127.0.0.1:{port}").status == 200


def test_the_card_says_what_the_run_is_and_names_no_image(folder: Path, server: Server) -> None:
    card = server.ask("GET", "/card").facts
    assert card == server.ready["card"]
    assert card["classes"] == ["covid", "normal"]
    assert card["backbones"][0]["name"] == "python:tiny_network:build"
    decision = json.loads((folder / "run" / "decision.json").read_text())["decisions"]["covid"]
    for key in ("threshold", "bound", "wish", "unit"):
        assert card["decision"]["covid"][key] == decision[key]
    figures = json.loads((folder / "run" / "evaluation" / "test.json").read_text())
    assert card["evaluation"]["test"]["sensitivity"] == figures["sensitivity"]
    assert ".png" not in json.dumps(card)
    assert str(folder) not in json.dumps(card)


def test_slow_clients_are_told_so_and_hold_nobody_up(folder: Path, server: Server) -> None:
    size = f"Content-Length: 1000\nContent-Type: {KIND['Content-Type']}"
    slow_body = server.begin(f"POST /predict HTTP/1.1\nHost: localhost\n{size}\n\n--{BOUNDARY}")
    slow_head = server.begin("POST /predict HTTP/1.1\nHost: local")
    silent = server.begin("")
    assert server.send(images(folder)[0]).status == 200
    held = ((slow_body, "the whole body"), (slow_head, "its head"), (silent, "its head"))
    for connection, expected in held:
        with connection:
            status, facts = read_raw(connection)
            assert (status, facts["error"]["expected"]) == (408, expected)


def test_a_client_that_goes_away_is_forgotten(server: Server) -> None:
    head = f"POST /predict HTTP/1.1\nHost: localhost\nContent-Type: {KIND['Content-Type']}\n"
    connection = server.begin(f"{head}Content-Length: 1000\n\n--{BOUNDARY}")
    while server.ask("GET", "/health").facts["num_requests"] < 1:
        pass  # the server has not read it yet
    connection.close()
    while server.ask("GET", "/health").facts["num_requests"] > 0:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="finds the children in Linux's /proc")
def test_decoders_that_die_take_nobody_along(folder: Path, server: Server) -> None:
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    assert children  # what is sent is decoded in them
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    good = images(folder)[0]
    for _ in range(2 * len(children)):
        answer = server.send(good)
        if answer.status != 200:
            assert_error(answer, 422, "crashed")
    assert server.send(good).status == 200


def test_no_http_is_refused(server: Server) -> None:
    with server.begin("nonsense\n\n") as connection:
        status, facts = read_raw(connection)
    assert (status, facts["error"]["expected"]) == (400, "HTTP")


def test_more_requests_than_it_takes_are_told_to_come_again(folder: Path, server: Server) -> None:
    name, data = images(folder)[0]
    body = form((name, data))
    head = f"POST /predict HTTP/1.1\nHost: localhost\nContent-Length: {len(body)}\n"
    held = [server.begin(f"{head}Content-Type: {KIND['Content-Type']}\n\n") for _ in range(4)]
    while server.ask("GET", "/health").facts["num_requests"] < NUM_REQUESTS:
        pass  # the server has not read them yet
    answer = server.send((name, data))
    assert_error(answer, 503, "at most 4")
    assert answer.headers["retry-after"] == "1"
    for connection in held:
        with connection:
            connection.sendall(body)
            assert read_raw(connection)[0] == 200
    assert server.send((name, data)).status == 200


def test_none_of_many_good_and_bad_requests_is_lost(folder: Path, server: Server) -> None:
    (good,) = images(folder)[:1]
    wanted = server.send(good).facts["predictions"]
    bodies = [form(good)] * 3 + [body for _, _, body, _ in REFUSED.values()]
    headers = [KIND] * 3 + [headers for *_, headers in REFUSED.values()]
    statuses = [200] * 3 + [status for status, *_ in REFUSED.values()]
    counted, lock = Counter[int](), threading.Lock()

    def work(number: int) -> None:
        for i in range(len(bodies)):
            which = (i + number) % len(bodies)
            answer = server.ask("POST", "/predict", bodies[which], **headers[which])
            assert answer.status in {statuses[which], 503}, answer  # 503: 6 clients, 4 at once
            if answer.status == 200:
                assert answer.facts["predictions"] == wanted
            with lock:
                counted[answer.status] += 1

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    assert counted.total() == 6 * len(bodies)
    assert counted[200] > 0
    assert counted[500] == 0
    assert server.ask("GET", "/health").facts["num_requests"] == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("kind", ["unreadable", "unreadable, to explain", "too large", "cut off"])
def test_what_was_refused_does_not_stay_in_memory(server: Server, kind: str) -> None:
    size = FILE_BYTES + 1 if kind == "too large" else FILE_BYTES - 1
    body = form(("a.png", bytes(size)))
    if kind == "cut off":
        body = body[:-10]
    path = "/explain" if "explain" in kind else "/predict"

    def refuse(count: int) -> None:
        for _ in range(count):
            assert server.ask("POST", path, body, **KIND).status in {400, 413, 422}

    refuse(4)
    before = server.memory()
    refuse(20)  # 120 MB
    assert server.memory() - before < 30e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_what_was_refused_is_dropped_while_the_client_still_sends(server: Server) -> None:
    body = form(("a.png", bytes(FILE_BYTES + 1)))[:-10]
    head = f"POST /predict HTTP/1.1\nHost: localhost\nContent-Length: {len(body) + 1}\n"
    head += f"Content-Type: {KIND['Content-Type']}\n\n"
    before = server.memory()
    with contextlib.ExitStack() as held:
        for _ in range(20):  # 120 MB
            connection = held.enter_context(server.begin(head))
            connection.sendall(body)
            assert read_raw(connection)[0] == 413
        assert server.memory() - before < 30e6


def test_an_image_is_explained_without_naming_the_training_images(
    folder: Path, server: Server
) -> None:
    name, data = images(folder)[0]
    answer = server.send((name, data), path="/explain")
    assert answer.status == 200, answer
    explanation = answer.facts["explanation"]
    assert explanation["positive"] == explanation["preds"][0]
    assert len(explanation["maps"][0]["map"]) == 16
    assert len(explanation["nearest"]) == 5
    assert {"path"} & set(explanation["nearest"][0]) == set()
    assert answer.facts["picture"].startswith("data:image/png;base64,")
    assert_error(server.send(("a.png", b"nonsense"), path="/explain"), 422)
    assert_error(server.send(("a.png", data), ("b.png", data), path="/explain"), 413)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = serving.importlib.util.find_spec
    monkeypatch.setattr(
        serving.importlib.util, "find_spec",
        lambda name: None if name == "uvicorn" else find(name),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"found no uvicorn. .*pip install 'featcache\[serve\]'"):
        featcache.serve("run")


def test_an_address_for_everybody_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(FeatcacheWarning, match="without a password"), pytest.raises(RunError):
        featcache.serve(tmp_path / "none", host="0.0.0.0", port=0)


@pytest.mark.parametrize("options", [{"host": "no.such.host.invalid"}, {"port": 70000}])
def test_an_address_that_cannot_be_listened_on_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--port"):
        featcache.serve("run", **options)

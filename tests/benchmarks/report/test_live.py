"""The live page: what is there so far, on this machine alone, nothing to change, gone with the comparison."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import _parser as parser
from benchmarks.compare import grid_of, main
from benchmarks.comparison import launch
from benchmarks.comparison.arms import arms
from benchmarks.comparison.grid import Grid
from benchmarks.comparison.launch import Watched
from benchmarks.comparison.outcomes import Outcome
from benchmarks.report.comparison import Comparison
from benchmarks.report.live import LivePage
from registry import UsageError
from tests.oracles.finished_runs import finish

GRID = Grid(title="Two arms", agents=("reft", "nested-reft/uniform/none"), seeds=(0,), set={"iterations": 4})
SET = {"iterations": 4, "evaluation.every": 2, "evaluation.samples": 4}


def half_done(runs: Path, rows: int) -> tuple[list[Watched], dict[str, str], Any]:
    """Two runs, the second with its first rows alone and no result; what reads them; and their labels."""
    made = arms(Grid(title="Two arms", agents=GRID.agents, seeds=(0,), set=SET))
    specs = [arm.specs[0] for arm in made]
    folders = [finish(spec, runs, 0.25, 0.75) for spec in specs]
    (folders[1] / "result.json").unlink()
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "metrics.jsonl").write_text("".join(lines[:rows]))
    watched = [Watched(spec, folder) for spec, folder in zip(specs, folders, strict=True)]
    for run in watched:
        run.look()
    watched[0].phase = "finished"
    labels = {arm.specs[0].hash: arm.label for arm in made}
    return watched, labels, lambda: Comparison.read(GRID, made, runs, {}, "command", look=Outcome.so_far)


def ask(port: int, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_it_shows_what_is_there_so_far(tmp_path):
    runs, labels, read = half_done(tmp_path, rows=4)  # evaluated at 0 and 2 of 4 iterations
    with LivePage(0) as live:
        live.follow(runs, labels, 1, read, tmp_path / "out")
        status, headers, page = ask(live.port)
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
        assert "connect-src 'self'" in page and "default-src 'none'" in page
        data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
        ends = {
            line["arm"]: line["x"][-1] for line in data[0]["charts"]["greedy"]["lines"] if line["axis"] == "iteration"
        }
        assert ends == {0: 4, 1: 2}
        progress = json.loads(ask(live.port, "/progress.json")[2])
        assert progress["headline"].startswith("1 of 2 runs done") and str(tmp_path / "out") in progress["headline"]
        assert [row[:5] for row in progress["rows"]] == [
            ["reft", "0", "finished", "4/4", "75.0%"],
            ["nested-reft/uniform/none", "0", "training", "2/4", "50.0%"],
        ]
        assert progress["version"] in page
        with (runs[1].folder / "metrics.jsonl").open("a") as file:
            file.write((runs[0].folder / "metrics.jsonl").read_text().splitlines(keepends=True)[-1])
        runs[1].look()
        assert json.loads(ask(live.port, "/progress.json")[2])["version"] != progress["version"]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_run_at_its_start_is_shown_beside_one_that_is_over(tmp_path, rows):
    runs, labels, read = half_done(tmp_path, rows)
    with LivePage(0) as live:
        live.follow(runs, labels, 1, read, tmp_path)
        status, _, page = ask(live.port)
        assert status == 200 and "nested-reft/uniform/none" in page and "Against reft" in page


def test_before_the_first_evaluation_there_is_a_page(tmp_path):
    with LivePage(0) as live:
        assert ask(live.port)[0] == 200 and "starting" in ask(live.port, "/progress.json")[2]
        runs, labels, read = half_done(tmp_path, rows=0)
        (runs[0].folder / "metrics.jsonl").write_text("")
        (runs[0].folder / "result.json").unlink()
        live.follow(runs[1:], labels, 1, read, tmp_path)
        assert ask(live.port)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:6420", "127.0.0.1.evil.example", "", "localhost.:1"])
def test_another_name_of_this_machine_is_refused(host):
    with LivePage(0) as live:
        assert ask(live.port, host=host)[0] == 403 and ask(live.port, "/progress.json", host)[0] == 403
        for own in (f"127.0.0.1:{live.port}", "localhost:9999", "localhost", "[::1]:1"):
            assert ask(live.port, host=own)[0] == 200


def test_nothing_else_is_there_and_nothing_can_be_changed():
    with LivePage(0) as live:
        for path in ("/runs", "/../../etc/passwd", "/progress.json/.."):
            assert ask(live.port, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert ask(live.port, method=method)[0] == 501
        status, headers, body = ask(live.port, method="HEAD")
        assert status == 200 and body == "" and int(headers["Content-Length"]) > 0


def test_it_listens_on_this_machine_alone_and_ends():
    with LivePage(0) as live:
        port = live.port
        assert live.server.server_address[0] == "127.0.0.1" and live.url == f"http://127.0.0.1:{port}/"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with LivePage(port) as again:  # the same address at once
        assert ask(again.port)[0] == 200


def test_a_port_that_cannot_be_had_is_an_error_of_one_line(tmp_path, capsys):
    with LivePage(0) as live:
        assert main(["--serve", str(live.port), "--runs", str(tmp_path)]) == 2
        said = capsys.readouterr().err
    assert said == f"error: --serve {live.port}: the port is in use; give another, or --serve 0 for any that is free\n"
    with pytest.raises(UsageError, match="--serve 70000"), LivePage(70000):
        pass
    assert main(["--serve", "--from", str(tmp_path)]) == 2 and "leave it out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


STAND_IN = """
import pathlib, shutil, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--spec") + 1]).parent
made = pathlib.Path(sys.argv[0]).parent / "made" / folder.name
for name in ("provenance.json", "metrics.jsonl"):
    shutil.copy(made / name, folder / name)
while not (made / "go on").exists():
    time.sleep(0.05)
shutil.copy(made / "result.json", folder / "result.json")
"""


def test_the_command_serves_until_it_ends(tmp_path, monkeypatch, capfd):
    """Runs that are made up beforehand end when the test has seen them on the page."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(launch, "PROGRAM", (sys.executable, "-S", str(tmp_path / "stand_in.py")))
    command = ["--agents", "reft", "--seeds", "2", "--jobs", "2", "--threads", "1", "--runs", str(tmp_path / "runs")]
    command += [f"--set={name}={value}" for name, value in SET.items()]
    grid = grid_of(parser().parse_args(command))
    folders = [finish(spec, tmp_path / "made", 0.25, 0.75) for arm in arms(grid) for spec in arm.specs]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    seen: list[str] = []

    def look() -> None:
        """Wait for the page, then for an accuracy of each run."""
        try:
            while True:
                with suppress(ConnectionRefusedError):
                    rows = json.loads(ask(port, "/progress.json")[2])["rows"]
                    if rows and all(row[4] for row in rows):
                        return seen.append(ask(port)[2])
                time.sleep(0.2)
        finally:
            for folder in folders:
                (folder / "go on").touch()

    watcher = threading.Thread(target=look)
    watcher.start()
    assert main([*command, "--quiet", "--serve", str(port)]) == 0
    watcher.join()
    assert len(seen) == 1 and "held-out accuracy" in seen[0] and 'id="live"' in seen[0]
    assert capfd.readouterr().err == f"live page: http://127.0.0.1:{port}/\n"
    (report,) = (tmp_path / "runs").glob("compare-*/report.html")
    assert 'id="live"' not in report.read_text().replace('getElementById("live")', "")

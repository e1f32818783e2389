"""What notebook 3 shows of the roles, from lines as the orchestrator writes them."""

from __future__ import annotations

from typing import Any

from lib.show.roles import by_method, roles_figure, summary

BUSY = {"role": "worker-0", "kind": "busy", "spans": [[12.0, 13.0]], "idle": 0.5, "time": 14.0}


def proof(at: float, version: int, method: str, holds: bool = True, worst: float | None = 1e-6) -> dict[str, Any]:
    facts = {"version": version, "method": method, "holds": holds, "worst": worst, "seconds": 0.02, "why": ""}
    return {"time": at, "role": "worker-0", "kind": "proof", **facts}


def sync(at: float, version: int, method: str, seconds: float) -> dict[str, Any]:
    facts = {"version": version, "step": version - 1, "method": method, "seconds": seconds}
    return {"time": at, "role": "worker-0", "kind": "sync", **facts}


FENCED = {"time": 12.6, "role": "worker-0", "kind": "fenced", "version": 2, "method": "reload", "next": "volume",
          "why": "log-probabilities differ by up to 0.3, more than 0.001"}  # fmt: skip
EVENTS = [
    {"time": 0.0, "role": "worker-0", "kind": "start"},
    {"time": 10.0, "role": "worker-0", "kind": "ready", "seconds": 10.0},
    sync(11.0, 1, "reload", 0.2), proof(11.1, 1, "reload", worst=3e-6),
    sync(12.5, 2, "reload", 0.4), proof(12.55, 2, "reload", holds=False, worst=0.3), FENCED,
    sync(13.9, 3, "volume", 1.2), proof(13.95, 3, "volume", worst=None), BUSY,
]  # fmt: skip


def test_every_method_has_its_syncs_and_proofs() -> None:
    reload, volume = by_method(EVENTS)
    assert (reload["method"], reload["syncs"], reload["seconds, median"]) == ("reload", 2, "0.300")
    assert (reload["proofs held"], reload["worst difference that held"]) == ("1 of 2", "3.0e-06")
    assert (volume["method"], volume["slowest"], volume["worst difference that held"]) == ("volume", "1.200", "")


def test_the_figure_is_drawn_from_the_first_lines_on() -> None:
    metric = {"step": 1, "tokens_per_second/worker-0": 10.0, "staleness/max": 0.0, "staleness/mean": 0.0}
    for count in range(1, len(EVENTS) + 1):
        for metrics in ([], [metric]):
            figure = roles_figure(EVENTS[:count], metrics, last=120.0)
            assert [ax.get_title(loc="left") for ax in figure.axes][1:] == [
                "Tokens a second", "Staleness (optimizer steps)", "Seconds to load weights",
            ]  # fmt: skip
            figure.canvas.draw()


def test_a_worker_that_never_answered_has_a_line_and_a_start_without_an_end(tmp_path: Any) -> None:
    events = [{"time": 0.0, "role": "worker-0", "kind": "start"}, {**FENCED, "time": 9.0}]
    (line,) = summary(events, [])
    assert line["role"] == "worker-0" and line["out of service"] == 1 and line["busy"] == ""
    roles_figure(events, []).savefig(tmp_path / "roles.png")

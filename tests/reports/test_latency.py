"""Costs of members: times that add up, work in closed form, files that refuse to be used for something else."""

import json
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from genlight.errors import UserError
from genlight.reports import latency
from genlight.reports.latency import measure_in_turn, measure_latency, profile_members
from genlight.reports.member_costs import (
    CostKey,
    Latency,
    MemberCost,
    MemberCosts,
    check_work,
    read_costs,
    write_costs,
)

KEY = CostKey(8, (4,), "float32", "cpu, 1 threads", "2.13.0")


class Clock:
    """A clock that moves only when something is done."""

    def __init__(self):
        self.now = 0.0

    def work(self, seconds):
        def call():
            self.now += seconds() if callable(seconds) else seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: made.now)
    return made


class Member(nn.Module):
    """A layer of width × width that takes `seconds`, and `change` more when the member before was another."""

    last = None

    def __init__(self, width=4, clock=None, seconds=0.0, change=0.0):
        super().__init__()
        self.layer = nn.Linear(4, width)
        self.register_buffer("table", torch.zeros(3, dtype=torch.float64))
        self.clock, self.seconds, self.change = clock, seconds, change

    def forward(self, x):
        if self.clock is not None:
            self.clock.now += self.seconds + (self.change if Member.last not in (None, self) else 0.0)
        Member.last = self
        return self.layer(x)


def inputs(member, batch_size):
    return {"x": torch.zeros(batch_size, 4)}


def costs(**latencies):
    members = {name: MemberCost(10, 10, 40, Latency(ms, 0.0, 20, 1)) for name, ms in latencies.items()}
    return MemberCosts("ms", members, 0.5, KEY)


def test_median_and_quartiles_of_what_the_clock_says(clock):
    values = iter([1.0, 2.0, 3.0, 4.0, 100.0])
    found = measure_latency(clock.work(lambda: next(values)), "cpu", warmup=0, repeats=5)
    assert found == Latency(3000.0, 2000.0, 5, torch.get_num_threads())


def test_calls_that_still_compile_do_not_count(clock):
    # each group of two takes half of the one before, then it stays
    values = iter([8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0] + [1.0] * 100)
    assert measure_latency(clock.work(lambda: next(values)), "cpu", warmup=2, repeats=4).median_ms == 1000.0
    with pytest.raises(ValueError, match="repeats = 0"):
        measure_latency(lambda: None, "cpu", repeats=0)


def test_calls_take_turns_and_getting_ready_is_not_timed(clock):
    """The machine becomes half as fast in the third of four rounds: both medians know it."""
    rounds = {"a": iter([9.0, 1.0, 2.0, 2.0]), "b": iter([9.0, 3.0, 6.0, 6.0])}
    seen = []

    def piece(name):
        def ready():
            clock.now += 100.0
            seen.append(name)
            return clock.work(lambda: next(rounds[name]))

        return ready

    assert measure_in_turn({name: piece(name) for name in "ab"}, "cpu") == {"a": 2000.0, "b": 6000.0}
    assert "".join(seen) == "abababab"


def test_what_lies_around_the_networks_is_a_part_of_the_cost():
    record = replace(costs(a=1.0, b=2.5), evaluation_ms=0.25, batch_ms=4.0)
    assert record.costs == {"a": 1.25, "b": 2.75} and record.batch == 4.0
    assert replace(record, unit="macs").batch == 0.0 and replace(record, unit="macs").costs["b"] == 1.0


def test_a_real_clock_is_read():
    found = measure_latency(lambda: time.sleep(0.004), "cpu", warmup=1, repeats=5)
    assert 4.0 <= found.median_ms < 40.0


def test_members_are_measured_with_their_changes(clock):
    Member.last = None
    zoo = {"a": Member(clock=clock, seconds=0.010, change=0.002), "b": Member(16, clock, 0.030, 0.002)}
    zoo["a"].train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = profile_members(zoo, inputs, 8, "cpu", repeats=6)
    assert list(found.costs) == ["a", "b"]
    assert found.costs["a"] == pytest.approx(10.0) and found.costs["b"] == pytest.approx(30.0)
    assert found.switch == pytest.approx(2.0)
    assert zoo["a"].training and found.notes == ()
    assert found.key.batch_size == 8 and found.key.shape == (4,) and found.key.dtype == "float32"


def test_work_parameters_and_bytes_in_closed_form():
    found = profile_members({"a": Member(4), "b": Member(12)}, inputs, 8, "cpu", unit="macs")
    assert found.members["b"] == MemberCost(4 * 12, 4 * 12 + 12, 4 * (4 * 12 + 12) + 8 * 3)
    assert found.costs == {"a": pytest.approx(1 / 3), "b": 1.0} and found.switch == 0.0


def test_doubtful_measurements_are_warnings_and_stay_in_the_record(clock):
    Member.last = None
    with pytest.warns(UserWarning, match="all members take the same time"):
        profile_members({n: Member(clock=clock, seconds=0.01) for n in "ab"}, inputs, 8, "cpu")
    with pytest.warns(UserWarning, match="wait for the launch"):
        profile_members({"a": Member(4, clock, 0.01), "b": Member(400, clock, 0.02)}, inputs, 8, "cpu")

    calls = iter(range(10_000))
    slow = clock.work(lambda: 0.01 if next(calls) < 6 + 20 else 0.02)  # two groups of warm-up and the first pass
    busy = Member(clock=clock)
    busy.forward = lambda x: slow()
    latency_of = latency.count_macs
    try:
        latency.count_macs = lambda *_, **__: 1
        with pytest.warns(UserWarning, match="something else may use the device"):
            found = profile_members({"busy": busy}, inputs, 8, "cpu")
    finally:
        latency.count_macs = latency_of
    assert "latency of busy" in found.notes[0] and found.costs["busy"] == pytest.approx(10.0)


def test_members_of_one_zoo_take_one_input():
    def two_shapes(member, batch_size):
        return {"x": torch.zeros(batch_size, 4, dtype=torch.float64 if member is zoo["b"] else torch.float32)}

    zoo = {"a": Member(), "b": Member().double()}
    with pytest.raises(ValueError, match="one shape and type"):
        profile_members(zoo, two_shapes, 8, "cpu", unit="macs")
    with pytest.raises(ValueError, match="8 rows"):
        profile_members({"a": Member()}, lambda *_: {"x": torch.zeros(3, 4)}, 8, "cpu", unit="macs")
    with pytest.raises(ValueError, match="at least one"):
        profile_members({}, inputs, 8, "cpu")


def test_a_file_reads_back_and_refuses_other_uses(tmp_path):
    path, record = tmp_path / "latency.json", costs(a=1.0, b=2.5)
    write_costs(path, record)
    assert read_costs(path, KEY) == record and list(read_costs(path).members) == ["a", "b"]
    for name, value in {"batch_size": 16, "shape": (8,), "dtype": "bfloat16", "device": "H100"}.items():
        with pytest.raises(UserError, match=f"measured for {name} = .* measure them again"):
            read_costs(path, replace(KEY, **{name: value}))
    with pytest.warns(UserWarning, match="measured with torch"):
        read_costs(path, replace(KEY, torch="3.0"))
    write_costs(path, replace(record, unit="macs"))
    assert read_costs(path, replace(KEY, device="H100", batch_size=1)).unit == "macs"
    with pytest.raises(UserError, match="shape"):
        read_costs(path, replace(KEY, shape=(8,)))


def test_other_networks_under_the_same_names_are_refused():
    """A sample's share of what a batch does once may be rounded; a network, or a guidance, is another one."""
    member = MemberCost(1000, 10, 40, Latency(2.5, 0.0, 20, 1))
    given = replace(costs(a=1.0), members={**costs(a=1.0).members, "b": member})

    def now(**changes):
        return replace(given, unit="macs", members={"b": replace(member, latency=None, **changes)})

    check_work(given, now(macs=1005))
    for changes in ({"macs": 2000}, {"parameters": 11}):
        with pytest.raises(UserError, match="measured for a b of"):
            check_work(given, now(**changes))


def test_changed_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "latency.json"
    write_costs(path, costs(a=1.0))
    content = json.loads(path.read_text())
    content["members"]["a"]["latency"]["median_ms"] = 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="was changed"):
        read_costs(path)
    for change, message in (
        ({"version": 1}, "version = 1"),
        ({"kind": "other"}, "kind"),
        ({"extra": 1}, "extra"),
        ({"members": {}}, "members: at least one"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            read_costs(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_costs(path)
    with pytest.raises(UserError, match="missing"):
        read_costs(tmp_path / "missing.json")

"""W&B offline, unreachable, silent and half-dead; every server here is on the loopback device."""

import contextlib
import csv
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from oracles.faults import hooked

from genlight.trainer.loggers import ResilientWandbLogger, WholeCSVLogger, answers

CONF = Path(__file__).parents[2] / "conf" / "logger"
# What a server that cannot be reached may cost beyond an offline run, the end of the process included. Alone on the
# machine the whole of W&B costs 3 (refused) to 7 seconds; taking the offline run off leaves the waiting, which the load
# of the machine does not stretch.
WAITED_SECONDS = 8.0

# In one process per scenario, forked after the slow imports: trains three steps with both loggers, uses every method
# of ours, and writes what happened. The parent adds how long each process took to end after its last line.
PROGRAM = """
import json, os, sys, time, warnings
from pathlib import Path
import lightning.pytorch as L, torch, wandb
from lightning.pytorch.loggers import CSVLogger
from genlight.trainer.loggers import ResilientWandbLogger

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, i):
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def run(folder, options):
    start = time.monotonic()
    logger = ResilientWandbLogger(project="p", save_dir=folder, **options)
    logger.log_hyperparams({"lr": 0.1, "api_key": "very-secret"})
    spent = time.monotonic() - start
    trainer = L.Trainer(max_steps=3, accelerator="cpu", logger=[CSVLogger(folder, name="metrics"), logger],
    log_every_n_steps=1,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 2)))
    start = time.monotonic()
    logger.log_image("grid", [torch.zeros(3, 8, 8)], step=3)
    logger.log_table("report", columns=["a"], data=[[1]])
    (folder / "artifact").mkdir()
    (folder / "artifact" / "report.json").write_text("{}")
    logger.log_folder(folder / "artifact", "report", "report")
    logger.finish()
    return trainer.global_step, spent + time.monotonic() - start

def child(folder, scenario):
    os.environ.update(scenario["environ"], HOME=str(folder / "home"))
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps, spent = run(folder, scenario["options"])
    ours = [str(w.message) for w in caught if str(w.message).startswith("W&B") or "log_model" in str(w.message)]
    found = {"steps": steps, "warnings": ours, "spent": spent, "ended": time.time()}
    (folder / "found.json").write_text(json.dumps(found))

scenarios = json.loads(sys.argv[1])
for name, scenario in scenarios.items():
    folder = Path(scenario["folder"])
    (folder / "home").mkdir(parents=True)
    if (pid := os.fork()) == 0:
        child(folder, scenario)
        sys.exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, (folder / "output.txt").read_text()
    file = folder / "found.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"lost": found["spent"] + time.time() - found["ended"]}))
"""


class Dying(http.server.BaseHTTPRequestHandler):
    """Answers the first requests, each after `delay` seconds; then accepts and says nothing."""

    answered, replies, delay = 0, 1, 0.0

    def do_POST(self):
        type(self).answered += 1
        if type(self).answered > self.replies:
            time.sleep(60)
            return
        time.sleep(self.delay)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def dying_server(replies=1, delay=0.0):
    handler = type("DyingAfter", (Dying,), {"answered": 0, "replies": replies, "delay": delay})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def silent_server():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each scenario's process did, and its folder; run once, however many workers run the tests."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "wandb_scenarios"
    servers = dying_server(), dying_server(3), dying_server(3, delay=2.9), silent_server()
    with FileLock(f"{root}.lock"), servers[0] as dying, servers[1] as later, servers[2] as slow, servers[3] as silent:
        if not (root / "done").exists():
            key = {"WANDB_API_KEY": "0" * 40}
            environs = {
                "offline": {"WANDB_MODE": "offline", "WANDB_BASE_URL": closed_port()},
                "closed": key | {"WANDB_BASE_URL": closed_port()},
                "silent": key | {"WANDB_BASE_URL": silent},
                "dying": key | {"WANDB_BASE_URL": dying},
                "dying after three": key | {"WANDB_BASE_URL": later},
                "slow": key | {"WANDB_BASE_URL": slow},
            }
            scenarios = {
                name: {"folder": str(root / name), "environ": environ, "options": {"log_model": name == "offline"}}
                for name, environ in environs.items()
            }
            clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
            clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parents[1])}
            command = [sys.executable, "-c", PROGRAM, json.dumps(scenarios)]
            result = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=150)
            assert result.returncode == 0, result.stderr[-3000:]
            (root / "done").touch()
    return {
        folder.name: (folder, json.loads((folder / "found.json").read_text()))
        for folder in root.iterdir()
        if folder.is_dir()
    }


def offline_runs(folder):
    return list((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_offline_needs_no_account_and_no_network(outcomes):
    folder, found = outcomes["offline"]
    assert found["steps"] == 3
    assert len(found["warnings"]) == 1 and "log_model" in found["warnings"][0]
    (record,) = offline_runs(folder)
    content = record.read_bytes()
    assert b"loss" in content and b"grid" in content
    assert b"very-secret" not in content and b"***" in content
    assert not any(b"very-secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("closed", "refused"),
        ("silent", "did not answer within 3 s"),
        ("dying", "deadline exceeded"),
    ],
)
def test_a_server_that_cannot_be_reached_costs_one_warning(outcomes, scenario, reason):
    folder, found = outcomes[scenario]
    assert found["steps"] == 3
    (warning,) = found["warnings"]
    assert "W&B cannot be reached, the run goes on offline" in warning and reason in warning
    assert found["lost"] - outcomes["offline"][1]["lost"] <= WAITED_SECONDS
    assert len(offline_runs(folder)) == 1
    rows = (folder / "metrics" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 4 and "loss" in rows[0]


def test_what_counts_as_an_answer():
    with dying_server() as url:
        answers(url, timeout=3)
        with pytest.raises(ConnectionError, match=r"did not answer within 0\.2 s|timed out"):
            answers(url, timeout=0.2)
    with pytest.raises(ConnectionError, match="refused"):
        answers("http://127.0.0.1:9", timeout=3)


def test_a_failing_logger_warns_once_and_never_raises(monkeypatch, recwarn, tmp_path):
    logger = ResilientWandbLogger(project="p", save_dir=tmp_path, offline=True)

    class Broken:
        id = "x"

        def __getattr__(self, name):
            raise RuntimeError("the service is gone\nlong trace")

    logger._experiment = Broken()
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_hyperparams({"a": 1})
    logger.log_image("g", [str(tmp_path / "absent.png")])
    logger.log_table("t", columns=["a"], data=[[1]])
    logger.log_folder(tmp_path, "name", "kind")
    logger.finalize("success")
    logger.finish()
    ours = [str(warning.message) for warning in recwarn if str(warning.message).startswith("W&B")]
    assert ours == ["W&B fails, the run goes on without what it was to log: the service is gone"]


def test_without_wandb_at_all_the_run_goes_on(monkeypatch, tmp_path):
    logger = ResilientWandbLogger(project="p", save_dir=tmp_path, offline=True)
    monkeypatch.setattr(
        logger, "_init", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.warns(UserWarning, match="fails offline too, the run goes on without it"):
        logger.log_metrics({"a": 1.0}, step=1)
    logger.log_hyperparams({"a": 1})
    logger.log_folder(tmp_path, "name", "kind")
    logger.finish()
    assert not (tmp_path / "wandb").exists()


def test_an_init_timeout_that_could_stall_a_run_is_refused():
    for seconds in (0, 11, -1):
        with pytest.raises(ValueError, match=r"logger\.wandb\.init_timeout"):
            ResilientWandbLogger(init_timeout=seconds)


def test_the_csv_keeps_its_rows_where_a_run_dies_as_a_column_is_added(tmp_path):
    def dies(operation, path):
        if operation == "rename" and Path(path).name == "metrics.csv":
            raise KeyboardInterrupt

    logger = WholeCSVLogger(tmp_path, name="metrics")
    file = Path(logger.log_dir) / "metrics.csv"
    for step, row in enumerate(({"loss": 1.0}, {"loss": 0.5, "val/fd": 2.0})):
        logger.log_metrics(row, step=step)
        logger.save()
    with file.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [row["loss"] for row in found] == ["1.0", "0.5"] and [row["val/fd"] for row in found] == ["", "2.0"]
    before = file.read_text()
    logger.log_metrics({"best": 3.0}, step=2)
    with hooked(dies), pytest.raises(KeyboardInterrupt):
        logger.save()
    assert file.read_text() == before


def test_the_configs_keep_csv_on():
    csv = OmegaConf.load(CONF / "csv.yaml")
    wandb = OmegaConf.load(CONF / "wandb.yaml")
    assert csv.csv._target_ == "genlight.trainer.loggers.WholeCSVLogger"
    assert wandb.defaults[0] == "csv" and wandb.wandb._target_ == "genlight.trainer.loggers.ResilientWandbLogger"
    assert all(path.read_text().startswith("# ") for path in CONF.glob("*.yaml"))


# a slow one is waited for twice: as it is asked, and as the run begins
@pytest.mark.parametrize(("scenario", "most"), [("dying after three", WAITED_SECONDS), ("slow", 10.0)])
def test_a_server_that_dies_in_the_middle_costs_one_warning(outcomes, scenario, most):
    """Whether it dies before or after the run began there decides which."""
    _, found = outcomes[scenario]
    assert found["steps"] == 3
    (warning,) = found["warnings"]
    assert "the run goes on" in warning
    assert found["lost"] - outcomes["offline"][1]["lost"] <= most

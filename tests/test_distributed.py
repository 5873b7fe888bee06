"""Several real processes over gloo, killed processes and full disks: no number may change, nothing may be lost.

All processes are fresh ones: FAISS followed by a fork hangs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import psutil
import pytest
import torch
from helpers import CONFIGS, differing, weights, write_loops

from anyo_lightning.runs import RunFolder

pytestmark = pytest.mark.distributed
Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path, cache: Path) -> Start:
    """Start the command line in a process of its own, one thread each."""

    def started(*words: object, limit: str = "", **variables: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "anyo_lightning", *map(str, words)]
        if limit:  # a prelude for Python: limits of the process, or its death
            command = [
                sys.executable,
                "-c",
                f"{limit}; from anyo_lightning.cli.main import main; main()",
                *map(str, words),
            ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ANYO_CACHE": str(cache), **variables}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return started


@pytest.fixture
def run(start: Start) -> Run:
    """Run the command line to its end; returns what it printed."""

    def finished(*words: object, code: int = 0, **settings: str) -> str:
        process = start(*words, **settings)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    return finished


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """701 users (three blocks of rows, not divisible) over 37 items, as options of the command line."""
    titles = [f"Film number {item}" for item in range(37)]
    files = write_loops(tmp_path_factory.mktemp("loops"), titles, users=701, lengths=(5, 14))
    return [f"--data.interactions={files[0]}", f"--data.items={files[1]}"]


def sasrec(*more: str) -> list[str]:
    """A small SASRec."""
    small = ["--model.encoders.dim=16", "--data.batch_tokens=400", "--data.max_items=20", "--data.shuffle_ties=false"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    return [f"--config={CONFIGS / 'sasrec.yaml'}", *small, *quiet, *more]


def e4srec(tiny_llm: str, *more: str) -> list[str]:
    """A small E4SRec that reads texts."""
    name = f"--model.encoders.backbone.name={tiny_llm}"
    small = ["--model.encoders.backbone.layers=1", "--model.encoders.backbone.dtype=float32"]
    sizes = ["--data.max_tokens=200", "--data.batch_tokens=6000", "--data.template={title}", "--data.max_items=20"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    return [f"--config={CONFIGS / 'e4srec_hybrid.yaml'}", name, *small, *sizes, *quiet, *more]


def same(first: RunFolder, second: RunFolder) -> bool:
    """Whether two runs' last weights are bit-identical."""
    return not differing(weights(first.last_checkpoint), weights(second.last_checkpoint))


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that it has started."""
    return [child.pid for child in psutil.Process(process.pid).children()]


def blocks_sigterm(pid: int) -> bool:
    """Whether all of its threads do; False where it has ended."""
    try:
        statuses = [file.read_text().splitlines() for file in Path(f"/proc/{pid}/task").glob("*/status")]
    except OSError:
        return False
    blocked = [int(line.split()[1], 16) for lines in statuses for line in lines if line.startswith("SigBlk")]
    return bool(blocked) and all(mask >> (signal.SIGTERM - 1) & 1 for mask in blocked)


@pytest.mark.parametrize("kind", ["sasrec", "e4srec"])
def test_figures_do_not_depend_on_the_number_of_processes(
    run: Run, loops: list[str], tiny_llm: str, tmp_path: Path, kind: str
) -> None:
    """Metrics, intervals, slices, coverage, Gini and predictions of 1, 2 and 3 processes are the same bytes."""
    options = sasrec() if kind == "sasrec" else e4srec(tiny_llm)
    folder = tmp_path / "run"
    run("fit", *options, *loops, "--trainer.max_epochs=1", f"--run={folder}")
    results, predictions = [], []
    for processes in (1, 2, 3):
        run("test", f"--run={folder}", f"--trainer.devices={processes}")
        results.append(json.loads(RunFolder(folder).metrics_file.read_text()))
        predictions.append(pl.read_parquet(RunFolder(folder).predictions_file))
    assert results[0]["protocol"]["rows"] == 701
    for found, lists in zip(results[1:], predictions[1:], strict=True):
        for part in ("metrics", "slices", "split", "protocol"):
            assert found[part] == results[0][part], part
        assert lists.equals(predictions[0])


def test_gradients_do_not_depend_on_the_number_of_processes(
    tiny_llm: str, tiny_data: tuple[Path, Path], tmp_path: Path, cache: Path
) -> None:
    """Two and three processes' gradient of one global batch is that of one process, for every variant's loss.

    Also where the LLM's weights are shared out and one process has more to read than the other, where they read their
    shares in parts, and where one has no share at all.
    """
    script = Path(__file__).with_name("gradients.py")
    environment = {**os.environ, "ANYO_CACHE": str(cache)}
    for processes, *sharded in ((1,), (2,), (3,), (2, "sharded")):
        (tmp_path / "meet").unlink(missing_ok=True)
        started = [
            subprocess.Popen(
                [
                    *(sys.executable, str(script), str(rank), str(processes), str(tmp_path)),
                    *(tiny_llm, *map(str, tiny_data), *sharded),
                ],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in range(processes)
        ]
        for process in started:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    names = ("1", "2", "3", "2-sharded")
    one, *several = (torch.load(tmp_path / f"gradients-{name}.pt", weights_only=True) for name in names)
    assert len(one) == 4 * 23
    for found in several:
        for name, expected in one.items():
            largest = max(float(gradient.abs().max()) for key, gradient in expected.items() if key != "loss")
            assert largest > 1e-3 or ", 2 rows" in name, name
            for key, gradient in expected.items():  # what is zero except for rounding is compared with the largest
                difference = float((found[name][key] - gradient).abs().max())
                assert difference <= 1e-5 * float(gradient.abs().max()) + 2e-6 * largest, f"{name} {key} {difference}"


def test_two_processes_train_one_run(run: Run, loops: list[str], tiny_llm: str, tmp_path: Path) -> None:
    """Fit on two processes: one folder, as many targets as there are, a checkpoint that one process tests."""
    output = run(
        "fit", *e4srec(tiny_llm), *loops, "--trainer.max_epochs=2", "--trainer.devices=2", "--trainer.strategy=ddp"
    )
    assert output.count("Run folder:") == 1
    (folder,) = (tmp_path / "runs" / "e4srec_hybrid").iterdir()
    found = json.loads(RunFolder(folder).metrics_file.read_text())
    curves = RunFolder(folder).read_curves()
    assert curves is not None
    targets = found["split"]["counts"]["training_interactions"] - found["split"]["counts"]["users"]
    assert curves["targets"].max() == 2 * targets
    run("test", f"--run={folder}", "--trainer.devices=1")
    again = json.loads(RunFolder(folder).metrics_file.read_text())
    assert again["metrics"] == found["metrics"]
    output = run("predict", f"--run={folder}", "--trainer.devices=2")
    queries = pl.read_parquet(RunFolder(folder).queries_file)
    assert queries["user_id"].n_unique() == len(queries) == 701


@pytest.mark.parametrize("kind", ["sracl_paper", "cllmrec_importance", "llara_pretrain", "csft"])
def test_training_is_logged_for_all_processes(
    run: Run, loops: list[str], tiny_llm: str, tmp_path: Path, kind: str
) -> None:
    """What is logged is of the whole batch, not of one process's share: the same as by one process."""
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    ids = ["--model.encoders.dim=16", "--model.encoders.dropout=0", "--data.batch_tokens=400", "--data.max_items=20"]
    llm = [f"--model.encoders.backbone.name={tiny_llm}", "--model.encoders.backbone.layers=1"]
    llm += ["--model.encoders.backbone.dtype=float32", "--data.template={title}"]
    own = {
        "sracl_paper": [*ids, f"--model.semantics.name={tiny_llm}", "--model.beta=0"],
        "cllmrec_importance": [*llm, "--model.encoders.dropout=0", "--model.encoders.input_dropout=0"],
        "llara_pretrain": llm,
        "csft": llm,
    }
    options = [f"--config={CONFIGS / kind}.yaml", *quiet, *own[kind]]
    curves = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run("fit", *options, *loops, "--trainer.max_epochs=2", f"--trainer.devices={processes}", f"--run={folder}")
        curve = RunFolder(folder).read_curves()
        assert curve is not None
        curves.append(curve.select(name for name in curve.columns if name.startswith("train/")).drop_nulls())
    one, two = curves
    assert len(one) >= 2
    assert one.columns == two.columns
    for name in one.columns:
        if not name.endswith("seconds"):
            assert two[name].to_list() == pytest.approx(one[name].to_list(), rel=1e-3), name


@pytest.mark.parametrize("kind", ["sasrec", "e4srec", "quantised"])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    run: Run, start: Start, loops: list[str], tiny_llm: str, tmp_path: Path, kind: str
) -> None:
    """Kill -9 in the middle of an epoch, `fit --run` again: bit-identical, dropout and shuffles included."""
    options = sasrec() if kind == "sasrec" else e4srec(tiny_llm)
    if kind == "quantised":
        pytest.importorskip("bitsandbytes")
        options.append(f"--config={CONFIGS / 'overlays' / 'quantized.yaml'}")
    options = [*options, *loops, "--trainer.max_epochs=3", "--save_every_n_steps=3", "--final_test=false"]
    run("fit", *options, f"--run={tmp_path / 'whole'}")
    parts = RunFolder(tmp_path / "parts")
    killed = 0
    for moment in (0, 1, 2):  # in the first epoch, and later ones
        process = start("fit", *options, f"--run={parts.path}")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            saved = parts.last_checkpoint
            if saved.is_file() and torch.load(saved, weights_only=True)["epoch"] >= moment:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.01)
        process.communicate()
    assert killed
    run("fit", *options, f"--run={parts.path}")
    assert same(parts, RunFolder(tmp_path / "whole"))
    whole, resumed = (RunFolder(path).read_curves() for path in (tmp_path / "whole", parts.path))
    assert whole is not None
    assert resumed is not None
    for column in ("step", "targets", "tokens", "val/ndcg@10"):
        kept = whole.filter(pl.col("val/ndcg@10").is_not_null())[column].to_list()
        assert resumed.filter(pl.col("val/ndcg@10").is_not_null())[column].to_list() == kept


def test_a_run_is_killed_while_it_writes_a_checkpoint(run: Run, start: Start, loops: list[str], tmp_path: Path) -> None:
    """Whenever the process dies, `last.ckpt` is a whole checkpoint, and the run resumes from it."""
    options = [*sasrec(), *loops, "--trainer.max_epochs=2", "--save_every_n_steps=1", "--final_test=false"]
    run("fit", *options, f"--run={tmp_path / 'whole'}")
    parts = RunFolder(tmp_path / "parts")
    process = start("fit", *options, f"--run={parts.path}")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if parts.last_checkpoint.is_file() and list(parts.checkpoints.glob(".last.ckpt.*")):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    torch.load(parts.last_checkpoint, weights_only=True)
    run("fit", *options, f"--run={parts.path}")
    assert same(parts, RunFolder(tmp_path / "whole"))


def test_sigterm_saves_and_exits(run: Run, start: Start, loops: list[str], tmp_path: Path) -> None:
    """A pre-empted node: the step at hand is kept, and the run resumes and ends with the same weights."""
    options = [*sasrec(), *loops, "--trainer.max_epochs=3", "--final_test=false"]
    run("fit", *options, f"--run={tmp_path / 'whole'}")
    parts = RunFolder(tmp_path / "parts")
    process = start("fit", *options, f"--run={parts.path}")
    while process.poll() is None and not parts.last_checkpoint.is_file():
        time.sleep(0.005)  # until the first epoch is over
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "weights_only" not in output  # Lightning's note on its own default
    steps = torch.load(parts.last_checkpoint, weights_only=True)["global_step"]
    whole = torch.load(RunFolder(tmp_path / "whole").last_checkpoint, weights_only=True)["global_step"]
    assert 0 < steps < whole
    run("fit", *options, f"--run={parts.path}")
    assert same(parts, RunFolder(tmp_path / "whole"))


def test_sigterm_leaves_workers_to_their_run(run: Run, start: Start, loops: list[str], tmp_path: Path) -> None:
    """A pre-empted node tells all processes: the loader's workers go on, since the run would fail without them."""
    options = [*sasrec(), *loops, "--trainer.max_epochs=2", "--final_test=false", "--data.num_workers=2"]
    run("fit", *options, f"--run={tmp_path / 'whole'}")
    parts, told = RunFolder(tmp_path / "parts"), set[int]()
    process = start("fit", *options, f"--run={parts.path}")
    while process.poll() is None:
        for worker in set(children(process)) - told:
            if blocks_sigterm(worker):  # it does from its start on, not from its parent's fork on
                os.kill(worker, signal.SIGTERM)
                told.add(worker)
        time.sleep(0.005)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert told
    assert same(parts, RunFolder(tmp_path / "whole"))


def test_a_run_without_memory_ends_with_its_workers(run: Run, loops: list[str], tmp_path: Path) -> None:
    """The loader is alive when Python exits, which ends workers by SIGTERM and waits for them."""
    fails = (
        "import torch; from anyo_lightning.models.base import RetrievalModule; "
        "RetrievalModule.loss = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError('as planned'))"
    )
    options = [*sasrec(), *loops, "--trainer.max_epochs=1", "--data.num_workers=2", f"--run={tmp_path / 'run'}"]
    assert "micro_batch_tokens" in run("fit", *options, limit=fails, code=2)


@pytest.mark.parametrize("recomputed", ["true", "false"])
def test_a_sharded_backbone_changes_no_number(
    run: Run, loops: list[str], tiny_llm: str, tmp_path: Path, recomputed: str
) -> None:
    """Two processes that share the LLM out end with DDP's weights and figures, bit-identical; one process takes over.

    Gradients are clipped, activations recomputed by both or by neither (then the last layer is computed only where it
    is read, which rounds otherwise), and the catalogue is encoded by both, unequally.
    """
    options = [*e4srec(tiny_llm), *loops, "--trainer.gradient_clip_val=0.1"]
    options.append(f"--model.encoders.backbone.gradient_checkpointing={recomputed}")
    sharded = [options[0], f"--config={CONFIGS / 'overlays' / 'fsdp.yaml'}", *options[1:]]
    whole, parts = (RunFolder(tmp_path / name) for name in ("whole", "parts"))
    for folder, words in ((whole, options), (parts, sharded)):
        cached = {"ANYO_CACHE": str(tmp_path / f"cache-{folder.path.name}")}
        run("fit", *words, "--trainer.devices=2", "--trainer.max_epochs=2", f"--run={folder.path}", **cached)
    assert "sharded: true" in parts.config_file.read_text()
    assert same(parts, whole)
    assert not [key for key in weights(parts.last_checkpoint) if "backbone" in key and "lora" not in key]
    figures = [folder.read_metrics()["metrics"] for folder in (whole, parts)]
    assert figures[0] == figures[1]
    run("test", f"--run={parts.path}", "--trainer.devices=1")
    assert parts.read_metrics()["metrics"] == figures[0]


@pytest.mark.parametrize("reaches", ["both", "second"])
def test_sigterm_ends_all_processes_after_the_same_step(
    run: Run, start: Start, loops: list[str], tmp_path: Path, reaches: str
) -> None:
    """Whichever process a pre-empting node tells: all save one state and exit, and the run resumes from it."""
    options = [*sasrec(), *loops, "--trainer.devices=2", "--final_test=false", "--early_stopping.patience=1000"]
    folder = RunFolder(tmp_path / "run")
    process = start("fit", *options, "--trainer.max_epochs=500", f"--run={folder.path}")
    while process.poll() is None and not folder.last_checkpoint.is_file():
        time.sleep(0.01)
    told = children(process) + [process.pid] * (reaches == "both")
    assert told
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    saved = torch.load(folder.last_checkpoint, weights_only=True)
    last = saved["epoch"] + 1
    run("fit", *options, f"--trainer.max_epochs={last}", f"--run={folder.path}")
    assert torch.load(folder.last_checkpoint, weights_only=True)["global_step"] > saved["global_step"]


def test_no_validation_is_lost_to_a_checkpoint(run: Run, start: Start, loops: list[str], tmp_path: Path) -> None:
    """A run is killed in the validation that follows a step at which it would have saved."""
    options = [*sasrec(), *loops, "--trainer.max_epochs=2", "--save_every_n_steps=1", "--final_test=false"]
    folder = RunFolder(tmp_path / "run")
    dies = (
        "import os; from anyo_lightning.training.guards import Guards; "
        "Guards.on_validation_start = lambda *_: os.kill(os.getpid(), 9)"
    )
    run("fit", *options, f"--run={folder.path}", limit=dies, code=-signal.SIGKILL)
    run("fit", *options, f"--run={folder.path}")
    curves = folder.read_curves()
    assert curves is not None
    assert len(curves.filter(pl.col("val/ndcg@10").is_not_null())) == 2


def test_sigterm_loses_no_validation(run: Run, loops: list[str], tmp_path: Path) -> None:
    """It comes before a validation within an epoch."""
    options = [*sasrec(), *loops, "--trainer.max_epochs=1", "--trainer.val_check_interval=3", "--final_test=false"]
    whole, parts = (RunFolder(tmp_path / name) for name in ("whole", "parts"))
    run("fit", *options, f"--run={whole.path}")
    told = (
        "import os; from anyo_lightning.training.guards import Guards; "
        "Guards.on_before_zero_grad = lambda _, trainer, *__: "
        "trainer.fit_loop.epoch_loop.batch_idx == 2 and os.kill(os.getpid(), 15)"
    )
    run("fit", *options, f"--run={parts.path}", limit=told)
    assert torch.load(parts.last_checkpoint, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"] == {
        "ready": 1,
        "started": 1,
        "processed": 0,
        "completed": 0,
    }
    run("fit", *options, f"--run={parts.path}")
    assert same(parts, whole)
    curves = [folder.read_curves() for folder in (whole, parts)]
    validated = [[] if c is None else c["val/ndcg@10"].drop_nulls().to_list() for c in curves]
    assert validated[0]
    assert validated[1] == validated[0]


@pytest.mark.parametrize("moment", ["validation", "test"])
def test_sigterm_after_the_last_step_leaves_the_checkpoint(
    run: Run, loops: list[str], tmp_path: Path, moment: str
) -> None:
    """In the last validation or the final test: the run ends, last.ckpt is that of training, and it is tested later."""
    options = [*sasrec(), *loops, "--trainer.max_epochs=2", "--checkpoint.mode=min"]  # the best is not the last
    whole, folder = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    run("fit", *options, "--final_test=false", f"--run={whole.path}")
    hook = {"validation": "on_validation_start", "test": "on_test_batch_end"}[moment]
    told = (
        f"import os; from anyo_lightning.training.guards import Guards; Guards.{hook} = lambda _, trainer, *__: "
        "trainer.current_epoch >= 1 and os.kill(os.getpid(), 15)"
    )
    run("fit", *options, f"--run={folder.path}", limit=told, code={"validation": 0, "test": -15}[moment])
    assert not folder.metrics_file.exists()
    assert same(folder, whole)
    assert differing(weights(folder.best_checkpoint), weights(whole.last_checkpoint))
    run("fit", *options, f"--run={folder.path}")
    assert folder.metrics_file.exists()
    assert same(folder, whole)


def test_two_runs_never_write_one_folder(run: Run, start: Start, loops: list[str], tmp_path: Path) -> None:
    """The second is refused in one sentence while the first is at work."""
    folder = RunFolder(tmp_path / "run")
    options = [*sasrec(), *loops, "--trainer.max_epochs=5000", "--early_stopping.patience=5000", f"--run={folder.path}"]
    process = start("fit", *options)
    while process.poll() is None and not folder.last_checkpoint.is_file():
        time.sleep(0.01)
    assert "is in use by another run" in run("fit", *options, code=2)
    process.kill()
    process.communicate()
    assert folder.last_checkpoint.is_file()


def test_a_process_that_dies_ends_the_others(start: Start, loops: list[str], tmp_path: Path) -> None:
    """Kill -9 of the second process: the first ends within a minute instead of waiting for it."""
    options = [*sasrec(), *loops, "--trainer.max_epochs=500", "--trainer.devices=2", f"--run={tmp_path / 'run'}"]
    process = start("fit", *options)
    while process.poll() is None and not RunFolder(tmp_path / "run").last_checkpoint.is_file():
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert process.returncode != 0


def test_a_diverging_run_says_where(run: Run, loops: list[str], tmp_path: Path) -> None:
    """A learning rate that explodes: step, batch and users are named, the checkpoint before it stays."""
    folder = RunFolder(tmp_path / "run")
    options = [*sasrec(), *loops, "--trainer.max_epochs=1", f"--run={folder.path}", "--final_test=false"]
    options.append("--trainer.gradient_clip_val=0")
    run("fit", *options)
    checkpoint = torch.load(folder.last_checkpoint, weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["lr"] = group["initial_lr"] = 1e38
    checkpoint["lr_schedulers"][0]["base_lrs"] = [1e38]
    torch.save(checkpoint, folder.last_checkpoint)
    before = folder.last_checkpoint.read_bytes()
    options[options.index("--trainer.max_epochs=1")] = "--trainer.max_epochs=9"
    output = run("fit", *options, code=2)
    (line,) = [line for line in output.splitlines() if line.startswith("anyo: error:")]
    for word in ("diverged: the loss is", "step", "batch", "users u", "last good checkpoint"):
        assert word in line
    torch.load(folder.last_checkpoint, weights_only=True)
    assert folder.last_checkpoint.read_bytes() == before


def test_a_full_disk_loses_nothing(run: Run, loops: list[str], tmp_path: Path) -> None:
    """No file may grow past 64 KiB: the new checkpoint is refused in a sentence, the old one stays."""
    folder = RunFolder(tmp_path / "run")
    options = [*sasrec(), *loops, f"--run={folder.path}", "--final_test=false"]
    run("fit", *options, "--trainer.max_epochs=1")
    before = folder.last_checkpoint.read_bytes()
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
    )
    output = run("fit", *options, "--trainer.max_epochs=2", limit=limit, code=2)
    assert "Expected to write" in output
    assert "as they were" in output
    assert folder.last_checkpoint.read_bytes() == before
    assert not list(folder.checkpoints.glob(".*"))


def test_out_of_memory_says_which_option_to_turn(run: Run, loops: list[str], tmp_path: Path) -> None:
    """The CPU's own allocator fails (limited address space): the tokens of the batch and the options are named."""
    wide = ["--data.batch_tokens=30000", "--model.encoders.dim=2048", "--model.encoders.layers=2"]
    limit = (
        "import resource, torch, lightning, faiss, transformers; from pathlib import Path; "
        "pages = int(Path('/proc/self/statm').read_text().split()[0]); "
        "size = pages * resource.getpagesize() + 2 * 2**30; resource.setrlimit(resource.RLIMIT_AS, (size, size))"
    )
    output = run("fit", *sasrec(), *loops, *wide, f"--run={tmp_path / 'run'}", limit=limit, code=2)
    assert "Out of memory at" in output
    assert "data.micro_batch_tokens" in output

"""TensorBoard, as its own reader reads it: curves, settings with figures, texts, the items' vectors."""

from pathlib import Path

import numpy as np
import pytest
from helpers import CONFIGS, Anyo, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from anyo_lightning.runs import RunFolder


@pytest.fixture
def fit(anyo: Anyo, small: list[str], tiny_data: tuple[Path, Path], tmp_path: Path) -> RunFolder:
    """Two epochs of SASRec on the tiny data, all of whose titles are a mean one."""
    items = tmp_path / "items.csv"
    lines = tiny_data[1].read_text().splitlines()
    header, *rows = lines
    position = header.split(",").index("title")
    rows = [",".join(("<script>|*x*" if i == position else c) for i, c in enumerate(r.split(","))) for r in rows]
    items.write_text("\n".join([header, *rows]))
    anyo(
        "fit",
        f"--config={CONFIGS / 'sasrec.yaml'}",
        *small,
        f"--data.items={items}",
        "--data.template={title}",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        f"--run={tmp_path / 'run'}",
    )
    return RunFolder(tmp_path / "run")


def read(run: RunFolder) -> EventAccumulator:
    """All events of a run folder."""
    events = EventAccumulator(str(run.path))
    events.Reload()
    return events


def test_board_shows_curves_settings_texts_and_vectors(fit: RunFolder) -> None:
    """One run: everything is there, and equals what the run folder says."""
    events, figures = read(fit), fit.read_metrics()
    scalars = events.Tags()["scalars"]
    assert {"lr-AdamW/others", "grad_norm/others", "train/loss", "val/ndcg@10", "test/ndcg@10"} <= set(scalars)
    assert all(event.value > 0 for event in events.Scalars("grad_norm/others"))
    assert events.Scalars("test/ndcg@10")[-1].value == pytest.approx(figures["metrics"]["test/ndcg@10"]["value"])

    cost = {name: events.Scalars(f"cost/{name}")[-1].value for name in figures["cost"]}
    assert cost == pytest.approx(figures["cost"])
    assert cost["trainable_parameters"] > 0

    start = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert start["encoders.dim"].number_value == 64
    assert start["model"].string_value == "SASRec"
    assert start["optimizer.lr"].number_value == pytest.approx(1e-3)
    assert start["seed"].number_value == 0
    metrics = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    ).experiment.metric_infos
    assert "test/ndcg@10" in {metric.name.tag for metric in metrics}

    texts = events.Tensors("val/recommendations/text_summary")
    assert len(texts) == 2
    shown = texts[-1].tensor_proto.string_val[0].decode()
    assert "&lt;script&gt;&#124;\\*x\\*" in shown
    assert "<script>" not in shown
    assert shown.count("#### User") == 5
    slices = events.Tensors("test/slices/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| target popularity | head |" in slices
    table = events.Tensors("test/figures/text_summary")[0].tensor_proto.string_val[0].decode()
    figure = figures["metrics"]["test/ndcg@10"]
    assert f"| test/ndcg@10 | {figure['value']:.4f} | {figure['low']:.4f} | {figure['high']:.4f} |" in table

    vectors = np.loadtxt(fit.path / "00000" / "items" / "tensors.tsv", delimiter="\t")
    best = weights(fit.best_checkpoint)
    assert any(value.shape == vectors.shape and np.allclose(value, vectors, atol=1e-6) for value in best.values())
    metadata = (fit.path / "00000" / "items" / "metadata.tsv").read_text().splitlines()
    assert metadata[0] == "item\tin training"
    assert metadata[1].startswith("<script>|*x*\t")
    assert len(metadata) == len(vectors) + 1


def test_another_logger_by_yaml_alone(anyo: Anyo, fit: RunFolder, tmp_path: Path) -> None:
    """Lightning's CSV logger gets figures and settings, and no event file is written."""
    folder = tmp_path / "other"
    logger = tmp_path / "logger.yaml"
    logger.write_text(
        "trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: "
        + str(folder)
        + "}}}"
    )
    anyo("fit", f"--config={fit.config_file}", f"--config={logger}", f"--run={tmp_path / 'again'}")
    assert not list((tmp_path / "again").glob("events*"))
    written = folder / "lightning_logs" / "version_0"
    assert "val/ndcg@10" in (written / "metrics.csv").read_text()
    assert "encoders.dim: 64" in (written / "hparams.yaml").read_text()
    again = RunFolder(tmp_path / "again")
    assert again.config_file.is_file()  # in the run folder, where `anyo test --run` reads it
    assert not (written / "config.yaml").exists()

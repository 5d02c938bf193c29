"""Stage 2, first unit: the preliminary training, whose gradients are recorded meanwhile with
`probe.record: during`.
"""

from __future__ import annotations

from pathlib import Path

from datasets import load_from_disk

from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.distributed.host_consistency import check_hosts_agree
from grads_ds.probe.callback import GradNormCallback
from grads_ds.probe.identity import recording_of, trained_with
from grads_ds.probe.recording import Pass, record_remaining
from grads_ds.run_dir.layout import checkpoints_folder
from grads_ds.run_dir.publish import publish_json
from grads_ds.training.checkpoints import set_strangers_aside
from grads_ds.training.train import TrainingJob, optimizer_steps, train_model


def run_preliminary_training(config: Config, run_dir: Path, identity: str) -> None:
    """Train on the whole pool for `probe.epochs` and write `probe/model`. Every rank calls this.

    With `probe.record: during` each sample's norms are those at the step that first saw it; samples
    that training did not reach are scored afterwards, and the table is complete when this returns.
    """
    pool_dir, model_dir, folder = (
        run_dir / "prepared/pool",
        run_dir / "probe/model",
        run_dir / "scores",
    )
    work_dir = run_dir / checkpoints_folder("probe/train")
    pool = load_from_disk(str(pool_dir))
    steps = optimizer_steps(len(pool), config.probe)
    callbacks, recording = [], None
    if config.probe.record == "during":
        recording = recording_of(config, run_dir, config.model.path)
        callbacks = [
            GradNormCallback(
                folder,
                pool,
                config.probe.layers,
                loss_reduction=config.probe.loss_reduction,
                flush_seconds=config.probe.flush_seconds,
                recording=recording,
                merge=False,
            )
        ]
    else:
        check_hosts_agree({"data": pool_dir, "model": config.model.path})
        # a training that begins anew makes another model: what was scored with the last one is void
        ranks.from_main(lambda: _begin_training(work_dir, folder, identity))
    # what the model there was trained with, while its recording is not finished
    done_file = run_dir / "probe/trained.json"
    if (
        recording is None
        or ranks.from_main(lambda: trained_with(done_file, model_dir)) != recording.key
    ):
        train_model(
            TrainingJob(
                config,
                config.probe,
                pool.select_columns(["input_ids", "labels"]),
                config.model.path,
                model_dir,
                work_dir,
                run_dir / "tensorboard/probe",
                steps,
                what="preliminary training",
                identity=identity,
                callbacks=callbacks,
            )
        )
    if recording is not None:
        key = recording.key
        ranks.from_main(lambda: publish_json(done_file, {"key": key}))
        record_remaining(Pass(config, run_dir, recording, str(model_dir), step=steps))
        ranks.from_main(done_file.unlink)


def _begin_training(work_dir: Path, folder: Path, identity: str) -> None:
    set_strangers_aside(work_dir, identity)
    if not work_dir.exists():
        _discard(folder)


def _discard(folder: Path) -> None:
    parts = list(folder.glob("part-*.parquet"))
    for file in parts:
        file.unlink()
    if parts:
        print(f"scores: {len(parts)} parts of the earlier model removed", flush=True)

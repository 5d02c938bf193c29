"""Stage 2: the preliminary training, then every pool sample's gradient norms."""

from __future__ import annotations

from pathlib import Path

from datasets import load_from_disk

from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.distributed.host_consistency import check_hosts_agree
from grads_ds.probe.callback import GradNormCallback
from grads_ds.probe.controls import FOLDER as CONTROLS
from grads_ds.probe.controls import prepare_controls
from grads_ds.probe.identity import recording_of, trained_with
from grads_ds.probe.recording import Pass, record_remaining, with_probe
from grads_ds.run_dir.layout import checkpoints_folder
from grads_ds.run_dir.publish import publish_json
from grads_ds.scores import Recording
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


def run_recording(config: Config, run_dir: Path) -> None:
    """Score every pool sample that no finished part holds yet, then merge and check.

    Every rank calls this.
    """
    model_path = str(run_dir / "probe/model") if config.probe.epochs > 0 else config.model.path
    if "early" in config.probe.extras:
        earlier = with_probe(config, extras=[])
        recording = recording_of(earlier, run_dir, config.model.path)
        record_remaining(
            Pass(earlier, run_dir, recording, config.model.path, folder="scores/early")
        )
    recording = recording_of(config, run_dir, model_path)
    record_remaining(Pass(config, run_dir, recording, model_path))
    if config.probe.controls:
        _record_controls(config, run_dir, recording, model_path)


def _record_controls(config: Config, run_dir: Path, recording: Recording, model_path: str) -> None:
    """Make the controls and score them as the pool was, against the same references."""
    count, described = ranks.from_main(lambda: prepare_controls(config, run_dir))
    if ranks.is_main():
        print(f"controls: {described}", flush=True)
    if not count:
        return
    # norms before the training are of the pool's rows alone
    extras = [name for name in config.probe.extras if name != "early"]
    inputs = recording.inputs | {"rows": "controls", "controls": config.probe.controls}
    inputs["control rows"] = count
    record_remaining(
        Pass(
            with_probe(config, extras=extras),
            run_dir,
            Recording(inputs, recording.start),
            model_path,
            rows_dir=CONTROLS,
            folder="scores/controls",
            references=recording.key,
        )
    )


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

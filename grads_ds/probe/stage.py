"""Stage 2, second unit: every pool sample's gradient norms. The training before it stands in
`preliminary_training.py`: a recording alone imports no trainer.
"""

from __future__ import annotations

from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.probe.controls import FOLDER as CONTROLS
from grads_ds.probe.controls import prepare_controls
from grads_ds.probe.identity import recording_of
from grads_ds.probe.recording import Pass, record_remaining, with_probe
from grads_ds.scores import Recording


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

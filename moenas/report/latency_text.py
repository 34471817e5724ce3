"""Calibrations and predicted latencies as text."""

from __future__ import annotations

from moenas.records import Calibration, Plain


def calibration_text(calibration: Calibration) -> list[str]:
    """Return lines on a calibration: its measurements, and how well it predicts."""
    fitted, tested = calibration.fitted, calibration.tested
    roles = [row["role"] for row in calibration.held_out]
    lines = [
        f"{calibration.objective} on {calibration.device['name']}"
        f" ({settings_text(calibration.settings)})",
        f"  fitted to {fitted['models']} models and {fitted['blocks']} single blocks;"
        f" {roles.count('interval')} further models set the interval, {len(tested)} test it;"
        f" {calibration.seconds:.0f} s",
        f"  {_quality(calibration)}",
    ]
    for row in tested:
        measured, value = (calibration.reference_ms * row[key] for key in ("measured", "predicted"))
        low, high = calibration.interval(value)
        lines.append(
            f"  {row['fingerprint']}: measured {measured:.3g} {calibration.unit}, predicted"
            f" {value:.3g} ({low:.3g} to {high:.3g}), spread of the measurement"
            f" {100 * row['spread']:.1f} %"
        )
    return lines


def settings_text(settings: Plain) -> str:
    """Return the settings of a workload in words."""
    threads = settings["threads"]
    return (
        f"{settings['phase']}, batch {settings['batch']}, {settings['context']} tokens,"
        f" {settings['dtype']}, {threads} thread{'s' if threads != 1 else ''}"
    )


def _quality(calibration: Calibration) -> str:
    """Say how well a calibration predicts the models that test it."""
    return (
        f"median error of the tested models {100 * calibration.median_error:.1f} %;"
        f" {calibration.covered} of {len(calibration.tested)} are inside the"
        f" {100 * calibration.coverage:.0f} % interval, a factor of {calibration.factor:.2f}"
        " below and above"
    )


def predicted_text(rows: list[Plain], calibrate: str | None = None) -> list[str]:
    """Return lines on the predicted latencies of a space, one row for each objective.

    `calibrate` is the command that makes a calibration; None where it cannot be run.
    """
    lines = []
    for row in rows:
        if row["missing"] is not None:
            way = f"; `{calibrate}` measures this device" if calibrate else ""
            lines.append(f"{row['objective']}: not predicted{way}")
            lines.append(f"  {row['missing']}")
            continue
        sizes = (
            f"{name} {row[name]['value']:.3g} ({row[name]['low']:.3g} to {row[name]['high']:.3g})"
            for name in ("smallest", "median", "largest")
        )
        lines.append(
            f"{row['objective']}, predicted for {row['drawn']} random architectures, in"
            f" {row['unit']}: {', '.join(sizes)}"
        )
        lines.append(
            f"  by the calibration of {row['made_at'][:10]} on {row['device']}"
            f" ({settings_text(row['settings'])}): {100 * row['coverage']:.0f} % intervals;"
            f" {row['covered']} of {row['tested']} tested models are inside, median error"
            f" {100 * row['median_error']:.1f} %"
        )
        if row["beyond"]:
            lines.append(
                f"  {row['beyond']} of these architectures are larger than the measured ones"
            )
    return lines

"""A diagnosis as tables for a terminal."""

from __future__ import annotations

import math

from rich.table import Table

from .analysis import Diagnosis


def tables(diagnosis: Diagnosis) -> list[Table | str]:
    """What to print, in order."""
    parts: list[Table | str] = [_length_table(diagnosis), _method_table(diagnosis)]
    parts.append(_exponent_text(diagnosis))
    if diagnosis.advantages is not None:
        parts.append(_advantage_text(diagnosis))
    parts.append(_column_text(diagnosis))
    parts += [f"Note: {note}" for note in diagnosis.notes]
    return parts


def _length_table(diagnosis: Diagnosis) -> Table:
    lengths = diagnosis.lengths
    title = f"{lengths.responses:,} responses in {lengths.batches:,} batch"
    title += "es" if lengths.batches > 1 else ""
    title += f", {lengths.empty:,} empty" if lengths.empty else ""
    table = Table(title=f"{title}: length in tokens")
    headings = ["shortest", *(f"{q:.0%}" for q in lengths.quantiles), "longest", "mean",
                "harmonic mean", "sigma of log"]  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    whole = [lengths.smallest, *lengths.quantiles.values(), lengths.largest]
    table.add_row(
        *(f"{value:,.0f}" for value in whole),
        f"{lengths.mean:,.1f}",
        f"{lengths.harmonic_mean:,.1f}",
        f"{lengths.log_deviation:.2f}",
    )
    return table


def _method_table(diagnosis: Diagnosis) -> Table:
    beta = diagnosis.exponent.beta
    table = Table(
        title=f"Batch gradient under Var(g) ~ L^{beta:.3g}, M = {diagnosis.max_length:,.0f}",
        caption="M E: bias, the factor on the true gradient. Swing: its largest over its smallest "
        "value in the batches; 1 is unbiased, up to a constant. Noise: CV |grad J| / sqrt(V).",
    )
    headings = "method", "M E / grad J", "swing", "noise", "over the best", "effective seqs"
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in diagnosis.methods:
        swing = "one batch" if row.swing is None else f"{row.swing.ratio:.2f} x"
        table.add_row(
            row.name,
            f"{row.scaled_expectation:,.4g}",
            swing,
            f"{row.cv:.4g}",
            f"{row.excess_noise:.2f} x",
            f"{row.effective_sequences:,.1f}",
        )
    return table


def _exponent_text(diagnosis: Diagnosis) -> str:
    exponent, estimate = diagnosis.exponent, diagnosis.exponent.estimate
    if estimate is not None:
        source = (
            f"estimated from {estimate.sequences:,} gradient norms, {estimate.confidence:.0%} "
            f"interval {estimate.low:.2f} to {estimate.high:.2f} ({estimate.groups:,} groups "
            "resampled)"
        )
    elif exponent.source == "assumed":
        source = "the paper's assumption; no gradient norms in the file, --beta gives another"
    else:
        source = "as given"
    return f"beta = {exponent.beta:.3g}: {source}.\nBest alpha: {diagnosis.best_alpha:.3g}."


def _advantage_text(diagnosis: Diagnosis) -> str:
    advantages = diagnosis.advantages
    assert advantages is not None
    text = f"Advantage 0, and so no gradient: {advantages.without_signal:.0%} of the responses."
    if math.isfinite(advantages.rank_correlation):
        text += (
            f" Else: mean length {advantages.mean_length_positive:,.0f} where it is positive, "
            f"{advantages.mean_length_negative:,.0f} where negative; rank correlation with length "
            f"{advantages.rank_correlation:+.2f}."
        )
    return text


def _column_text(diagnosis: Diagnosis) -> str:
    """Which columns were used, so that a wrong one is seen."""
    used = [f"{kind} = {source}" for kind, source in diagnosis.sources.items() if source]
    missing = [kind for kind, source in diagnosis.sources.items() if not source]
    text = f"Columns: {', '.join(used)}."
    if missing:
        text += f" Not in the file: {', '.join(missing)}."
    if others := diagnosis.unused_columns:
        more = f" and {len(others) - 12:,} more" if len(others) > 12 else ""
        text += f" Not used: {', '.join(others[:12])}{more}."
    return text

"""Agreement between rungs: how well the losses at each rung rank candidates."""

from __future__ import annotations

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moenas.grammar.summary import short
from moenas.predict.rank_agreement import MIN_PAIRS, RankAgreement, rank_agreements
from moenas.records import View
from moenas.report import figures

NEEDS = "rungs"
TITLE = "Agreement between rungs"


def figure(view: View) -> go.Figure:
    """Draw the rank correlation of each rung with the final loss, and who trained on from it."""
    final = {
        e.trial: e.metrics["val_loss"]
        for e in view.evaluations
        if e.status == "complete" and not e.is_copy and "val_loss" in e.metrics
    }
    agreements = list(rank_agreements(view.rungs, final).values())
    if not agreements:
        return figures.blank(TITLE, "the study has no rungs, or no candidate has reached one yet")
    drawn = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.6, 0.4],
        vertical_spacing=0.08,
        figure=figures.drawing(TITLE, _subtitle(agreements)),
    )
    places = [short(rung.tokens) for rung in agreements]
    drawn.add_trace(_correlations(places, agreements), row=1, col=1)
    for name, counts, colour in _bars(agreements):
        drawn.add_bar(x=places, y=counts, name=name, marker_color=colour, row=2, col=1)
    drawn.update_yaxes(title_text="rank correlation", range=[-0.05, 1.05], row=1, col=1)
    if any((rung.correlation or 0) < 0 for rung in agreements):
        drawn.update_yaxes(range=[-1.05, 1.05], row=1, col=1)
    drawn.update_yaxes(title_text="candidates", rangemode="tozero", row=2, col=1)
    drawn.update_xaxes(type="category")
    drawn.update_xaxes(title_text="training tokens at the rung", row=2, col=1)
    drawn.update_layout(barmode="stack", bargap=0.5)
    return drawn


def _subtitle(agreements: list[RankAgreement]) -> str:
    text = "Spearman's correlation of the losses at a rung with the final ones"
    if any(rung.correlation is not None and rung.pairs < MIN_PAIRS for rung in agreements):
        text += f"; hollow: fewer than {MIN_PAIRS} candidates have both"
    return text


def _correlations(places: list[str], agreements: list[RankAgreement]) -> go.Scatter:
    """Return the line of correlations; a rung with few pairs has a hollow point."""
    pairs = zip(places, agreements, strict=True)
    known = [(place, rung) for place, rung in pairs if rung.correlation is not None]
    return go.Scatter(
        x=[x for x, _ in known],
        y=figures.rounded([rung.correlation or 0.0 for _, rung in known]),
        hovertemplate="%{hovertext}<extra></extra>",
        hovertext=[f"{r.correlation:.3f} over {r.pairs} candidates" for _, r in known],
        line={"color": figures.BLUE, "width": 2},
        marker={
            "color": figures.BLUE,
            "size": 9,
            "symbol": ["circle" if r.pairs >= MIN_PAIRS else "circle-open" for _, r in known],
        },
        mode="lines+markers",
        showlegend=False,
    )


def _bars(agreements: list[RankAgreement]) -> list[tuple[str, list[int], str]]:
    """Return the parts of each rung's candidates: their name, counts and colour."""
    stayed = [rung.reached - rung.promoted for rung in agreements]
    return [
        ("trained on", [rung.promoted for rung in agreements], figures.BLUE),
        ("stopped or paused", stayed, figures.GREY),
    ]

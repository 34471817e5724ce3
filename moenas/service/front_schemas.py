"""The typed bodies of responses about a front: its members, its noise and its growth."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from moenas.service.schemas import Model


class Member(Model):
    """One candidate of a front."""

    trial: int
    values: dict[str, float]
    params: int
    active_params: int
    fingerprint: str
    has_weights: bool
    summary: str = Field(description="The architecture in one line.")
    architecture: dict[str, Any]


class ObjectiveNoise(Model):
    """How much an objective differs between seeds of one model."""

    deviation: float
    degrees: int = Field(description="Degrees of freedom of the deviation.")


class SeedMean(Model):
    """The mean of an objective over `mean_seeds` seeds of a trial."""

    mean: float
    half_width: float | None = Field(description="Half of its 95 % interval.")


class SeedMember(Model):
    """One candidate of a front, over all of its seeds."""

    trial: int
    seeds: int = Field(description="Seeds that it was trained with.")
    mean_seeds: int = Field(description="Seeds in its means: the further ones, if there are two.")
    values: dict[str, SeedMean]
    probability: float | None = Field(description="That no other trial dominates it.")


class SeedPair(Model):
    """Two neighbours on a front, and the noise of their difference."""

    trials: list[int]
    difference: float
    noise: float


class SeedReport(Model):
    """The noise between seeds of a study with replicates."""

    objectives: dict[str, ObjectiveNoise]
    noisy: list[str]
    members: list[SeedMember]
    pairs: dict[str, list[SeedPair]]
    left_out: int


class Front(Model):
    """The non-dominated candidates, best first by the first objective."""

    study: str
    directions: dict[str, Literal["minimize", "maximize"]]
    hypervolume: float | None
    reference_point: dict[str, float]
    members: list[Member]
    caption: list[str] = Field(description="How the numbers were measured, in sentences.")
    seeds: SeedReport | None = Field(None, description="Null without `search.replicates`.")


class HistoryPoint(Model):
    """The front after one more complete trial."""

    trial: int
    hypervolume: float
    entered: bool
    left: list[int]
    size: int


class History(Model):
    """The front after each complete trial, by one reference point."""

    points: list[HistoryPoint]

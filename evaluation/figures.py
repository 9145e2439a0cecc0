"""The figures of the ALOE protocol, from what each persona scored at each turn. Only numpy.

    measurements   name → (P, K): P personas in a fixed order, K turns; NaN where a dialogue was dropped or had ended
    curves         name → (..., K): means over personas; a leading axis of R holds bootstrap resamples
    figures        name → (...): one number per curve, or per pair of curves

A resample of personas is a row of weights, how often each persona was drawn: so all means of all resamples are one
matrix product, and every figure is computed for the data and for its resamples by the same lines.

Definitions are those that the published tables imply (RLPA, arXiv 2505.15456, section 4; ALOE, arXiv 2410.03642):
AL(k) = 100 · mean response reward at turn k, AVG its mean over turns, IR and R² slope and fit of the least-squares line
through AL(k), N-IR and N-R² the same after AL(k) was stretched to [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 95.0  # per cent, of every interval
CONSTANT = 1e-9  # a curve that moves by less is flat: rounding has no slope


def persona_weights(personas: int, seed: int, resamples: int = RESAMPLES) -> Array:
    """Return (1 + R, P) weights: a row of ones for the data itself, then R bootstrap resamples of the personas.

    >>> persona_weights(3, seed=0, resamples=2).sum(1)
    array([3., 3., 3.])
    """
    if personas < 1:
        raise ValueError(f"{personas} personas; at least one is needed")
    drawn = np.random.default_rng(seed).multinomial(personas, np.full(personas, 1 / personas), size=resamples)
    return np.concatenate([np.ones((1, personas)), drawn])


def weighted_mean(values: Array, weights: Array) -> Array:
    """Return the mean over personas (..., K) of values (P, K) by weights (..., P), without absent ones (NaN).

    >>> weighted_mean(np.array([[1.0, np.nan], [3.0, 4.0]]), np.ones((1, 2)))
    array([[2., 4.]])
    """
    if values.ndim != 2 or weights.shape[-1] != len(values):
        raise ValueError(f"values {values.shape} and weights {weights.shape}; (P, K) and (..., P) are needed")
    seen = np.isfinite(values)
    return ratio(weights @ np.where(seen, values, 0.0), weights @ seen)


def ratio(above: Array, below: Array) -> Array:
    """Return above ÷ below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=np.asarray(below) != 0)


def line_fit(curve: Array) -> tuple[Array, Array]:
    """Return slope and R² of the least-squares line through (..., K) at k = 1..K, absent turns left out.

    A flat curve, or a single turn, has slope 0 and R² 0.

    >>> [round(float(x), 3) for x in line_fit(np.array([1.0, 2.0, 4.0]))]
    [1.5, 0.964]
    """
    seen = np.isfinite(curve)
    n = seen.sum(-1, keepdims=True)
    turns = np.broadcast_to(np.arange(1.0, curve.shape[-1] + 1), curve.shape)
    x, y = (np.where(seen, a - ratio(np.where(seen, a, 0).sum(-1, keepdims=True), n), 0.0) for a in (turns, curve))
    xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
    flat = (xx == 0) | (np.abs(y).max(-1) < CONSTANT)
    slope = np.where(flat, 0.0, xy / np.where(flat, 1.0, xx))
    r2 = np.where(flat, 0.0, xy**2 / np.where(flat, 1.0, xx * yy))  # 1 − residuals² / deviations² of such a line
    absent = n[..., 0] == 0
    return np.where(absent, np.nan, slope), np.where(absent, np.nan, r2)


def stretch(curve: Array) -> Array:
    """Return a curve (..., K) stretched to [0, 1] over its turns; a flat one becomes 0.

    >>> stretch(np.array([50.0, 60.0, 70.0])).tolist(), stretch(np.array([7.0, 7.0])).tolist()
    ([0.0, 0.5, 1.0], [0.0, 0.0])
    """
    low = np.where(np.isfinite(curve), curve, np.inf).min(-1, keepdims=True)
    high = np.where(np.isfinite(curve), curve, -np.inf).max(-1, keepdims=True)
    flat = high - low < CONSTANT
    return np.where(flat, 0.0 * curve, (curve - low) / np.where(flat, 1.0, high - low))


def mean_over_turns(curve: Array) -> Array:
    """Return the mean over turns (...) of a curve (..., K), absent turns left out; NaN if all are."""
    seen = np.isfinite(curve)
    return ratio(np.where(seen, curve, 0.0).sum(-1), seen.sum(-1))


def alignment_figures(al: Array) -> dict[str, Array]:
    """Return AVG, IR, R2, N-IR and N-R2 (...) of AL(k), (..., K).

    >>> {name: round(float(x), 3) for name, x in alignment_figures(np.array([40.0, 50.0, 70.0])).items()}
    {'AVG': 53.333, 'IR': 15.0, 'R2': 0.964, 'N-IR': 0.5, 'N-R2': 0.964}
    """
    slope, r2 = line_fit(al)
    normalized_slope, normalized_r2 = line_fit(stretch(al))
    return {"AVG": mean_over_turns(al), "IR": slope, "R2": r2, "N-IR": normalized_slope, "N-R2": normalized_r2}


def curves_of(measurements: dict[str, Array], weights: Array) -> dict[str, Array]:
    """Return the mean (..., K) of each measurement (P, K), and profile F1 ÷ its maximum: a ratio of such means.

    Above the line are only matches that the dialogue has disclosed, so that the ratio ends at 1: a lucky guess may
    beat the maximum.
    """
    curves = {name: weighted_mean(values, weights) for name, values in measurements.items()}
    return curves | {"f1_over_max": ratio(curves["evidence_f1"], curves["max_f1"])}


def figures_of(curves: dict[str, Array], change_turn: int | None = None) -> dict[str, Array]:
    """Return all figures (...) of a subject: those of AL(k), and the mean over turns of each other curve.

    change_turn: the first turn (from 1) with changed preferences; adds how many turns it took to recover from that.
    """
    figures = alignment_figures(curves["AL"])
    figures |= {name: mean_over_turns(curve) for name, curve in curves.items() if name != "AL"}
    paid = np.isfinite(curves["f1_over_max"])  # turns at which something was disclosed
    shares = [mean_over_turns(np.where(paid, curves[name], np.nan)) for name in ("evidence_f1", "max_f1")]
    figures["f1_over_max"] = ratio(*shares)
    if change_turn:
        for name in ("AL", "f1_over_max"):
            figures[f"recovery_{name}"] = recovery_turns(curves[name], change_turn)
    return figures


def recovery_turns(curve: Array, change_turn: int) -> Array:
    """Return the turns (...) from a change at `change_turn` (from 1) until the level of the turn before is back.

    0: it was never lost; inf: it did not come back; NaN: the turn before was not measured.

    >>> recovery_turns(np.array([[50.0, 70.0, 20.0, 60.0, 75.0], [50.0, 70.0, 20.0, 60.0, 60.0]]), change_turn=3)
    array([ 2., inf])
    """
    if not 2 <= change_turn <= curve.shape[-1]:
        raise ValueError(f"--change-turn {change_turn} must lie in [2, {curve.shape[-1]}], the turns of a dialogue")
    before, after = curve[..., change_turn - 2, None], curve[..., change_turn - 1 :]
    back = after >= before - CONSTANT
    turns = np.where(back.any(-1), back.argmax(-1).astype(float), math.inf)
    return np.where(np.isfinite(before[..., 0]), turns, np.nan)


def perplexity_samples(scores: Array, seed: int) -> Array:
    """Return the perplexity (1 + R,) of the texts and of their bootstrap resamples, for `estimate`.

    Texts are resampled, not tokens; equal seeds draw equal texts, so that two policies' samples are paired.
    """
    nats, tokens = np.moveaxis(persona_weights(len(scores), seed) @ scores, -1, 0)  # (1 + R,) each
    return np.exp(ratio(nats, tokens))


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval; NaN where nothing was measured, or there is no interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        if math.isnan(self.low):
            return shown(self.value)
        return f"{shown(self.value)} [{shown(self.low)}, {shown(self.high)}]"


def shown(x: float) -> str:
    """Write a number in a table's cell.

    >>> shown(73.377), shown(0.0904), shown(-0.0004), shown(float("nan")), shown(float("inf"))
    ('73.38', '0.090', '0.000', '-', 'never')
    """
    if math.isnan(x):
        return "-"
    if math.isinf(x):
        return "never"
    digits = 2 if abs(x) >= 10 else 3
    return f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.000"


def estimate(samples: Array) -> Estimate:
    """Return value and percentile interval of a figure (1 + R,): the data's own, then its resamples'.

    The interval's ends are resamples themselves, not points between two, because `inf` may be one.
    """
    found = samples[1:][~np.isnan(samples[1:])]
    tail = (100 - LEVEL) / 2
    ends = np.percentile(found, [tail, 100 - tail], method="inverted_cdf") if len(found) else (np.nan, np.nan)
    return Estimate(float(samples[0]), float(ends[0]), float(ends[1]))


@dataclass(frozen=True)
class Summary:
    """What a subject scored, or what one scored more than another: figures, and curves with an estimate per turn."""

    personas: int  # that count: not dropped
    figures: dict[str, Estimate]
    curves: dict[str, list[Estimate]]


def summarize(measurements: dict[str, Array], seed: int, change_turn: int | None = None) -> Summary:
    """Return all figures and curves of a subject, with intervals over its personas. Dropped ones (all NaN) are out."""
    chosen = kept(measurements)
    return _summary(*_samples(measurements, chosen, seed, change_turn), chosen)


def compare(one: dict[str, Array], other: dict[str, Array], seed: int) -> Summary:
    """Return `one` − `other` on the personas that both have, resampled together: who is hard for one is for both.

    Raises ValueError if the two were not measured on equally many personas and turns.
    """
    if one["AL"].shape != other["AL"].shape:
        raise ValueError(f"measured {one['AL'].shape} and {other['AL'].shape}: not the same personas and turns")
    both = kept(one) & kept(other)
    (figures, curves), (others, other_curves) = (_samples(m, both, seed) for m in (one, other))
    figures = {name: values - others[name] for name, values in figures.items()}
    return _summary(figures, {name: curve - other_curves[name] for name, curve in curves.items()}, both)


def kept(measurements: dict[str, Array]) -> NDArray[np.bool_]:
    """Return which personas (P,) count: those with a score at any turn."""
    return np.isfinite(measurements["AL"]).any(-1)


def _samples(
    measurements: dict[str, Array], chosen: NDArray[np.bool_], seed: int, change_turn: int | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return figures (1 + R,) and curves (1 + R, K) of the chosen personas and their resamples."""
    if not chosen.any():  # nobody is left: all is NaN
        chosen = np.ones_like(chosen)
    curves = curves_of({name: x[chosen] for name, x in measurements.items()}, persona_weights(int(chosen.sum()), seed))
    return figures_of(curves, change_turn), curves


def _summary(figures: dict[str, Array], curves: dict[str, Array], chosen: NDArray[np.bool_]) -> Summary:
    by_turn = {name: [estimate(curve[:, k]) for k in range(curve.shape[1])] for name, curve in curves.items()}
    return Summary(int(chosen.sum()), {name: estimate(values) for name, values in figures.items()}, by_turn)

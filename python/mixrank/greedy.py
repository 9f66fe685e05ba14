"""The greedy choice of one point for each layer under a budget, along the lower convex hull of cost and error."""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One choice for one layer: a rank (None: dense), what it costs, and the error that it leaves."""

    rank: int | None
    cost: int
    error: float


def greedy(choices: dict[str, list[Point]], available: int) -> dict[str, Point]:
    """One point for each layer, costing ``available`` at most: always the step that saves most error per cost.

    A step that does not fit is followed as far as the budget goes, and its layer is closed.
    """
    chosen = {name: points[0] for name, points in choices.items()}
    available -= sum(point.cost for point in chosen.values())
    paths = {name: steps(points) for name, points in choices.items()}
    heap: list[tuple[float, int, str]] = []

    def offer(order: int, name: str) -> None:
        if paths[name]:
            heapq.heappush(heap, (_slope(chosen[name], paths[name][0]), order, name))

    for order, name in enumerate(choices):
        offer(order, name)
    while heap:
        _, order, name = heapq.heappop(heap)
        step = paths[name].pop(0)
        if step.cost - chosen[name].cost <= available:
            best = step
            available -= best.cost - chosen[name].cost
            chosen[name] = best
            offer(order, name)
        else:
            best = max(
                (point for point in choices[name] if point.cost - chosen[name].cost <= available),
                key=lambda point: point.cost,
            )
            if best.cost > chosen[name].cost:
                available -= best.cost - chosen[name].cost
                chosen[name] = best
    return chosen


def steps(points: list[Point]) -> list[Point]:
    """The points after the first that the greedy choice visits: the hull of the ranks, and the dense weight last."""
    dense = [point for point in points[1:] if point.rank is None]
    return [*lower_hull([point for point in points if point.rank is not None])[1:], *dense]


def lower_hull(points: list[Point]) -> list[Point]:
    """The points on the lower convex hull of (cost, error), cost rising, error falling strictly."""
    hull: list[Point] = []
    for point in points:
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(start: Point, end: Point) -> float:
    return (end.error - start.error) / (end.cost - start.cost)

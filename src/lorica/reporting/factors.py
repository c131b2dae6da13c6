"""The factors trained in each layer and round: decisions.jsonl as one row per layer."""

from __future__ import annotations

from dataclasses import dataclass

from lorica.reporting.run_folder import Run


@dataclass(frozen=True)
class FactorRow:
    """One layer (or site) over the rounds of `factor_rounds`; each choice is "A", "B", "AB", "R", or "" for none."""

    label: str
    choices: tuple[str, ...]

    def share(self, factor: str) -> float:
        """Fraction of the rounds in which the factor was trained, alone or with the other one."""
        return sum(factor in choice for choice in self.choices) / len(self.choices)


def factor_rounds(run: Run) -> list[int]:
    """The rounds with a recorded decision, in order."""
    return [row["round"] for row in run.decisions]


def factor_rows(run: Run) -> list[FactorRow]:
    """One row per layer, or per site if the sites of a layer ever differ. Empty if no decision was recorded.

    A site that is not listed in a round trained neither factor. Sites without a layer number have their own rows, after
    the layers.
    """
    sites = {site for row in run.decisions for site in row["factors"]}
    choices = {site: tuple("".join(sorted(row["factors"].get(site, ""))) for row in run.decisions) for site in sites}
    layers: dict[tuple[int, ...], list[str]] = {}
    for site in sorted(sites):
        if layer_numbers(site):
            layers.setdefault(layer_numbers(site), []).append(site)
    unnumbered = [FactorRow(site, choices[site]) for site in sorted(sites) if not layer_numbers(site)]
    if all(len({choices[site] for site in group}) == 1 for group in layers.values()):
        return [
            FactorRow(f"layer {_dotted(layer)}", choices[layers[layer][0]]) for layer in sorted(layers)
        ] + unnumbered
    numbered = [
        FactorRow(f"layer {_dotted(layer)} {_site_label(site, layers[layer])}", choices[site])
        for layer in sorted(layers)
        for site in layers[layer]
    ]
    return numbered + unnumbered


def layer_numbers(site: str) -> tuple[int, ...]:
    """The integers in a dotted name, which identify its layer: `(3,)`, or `(0, 1)` for block 1 of stage 0."""
    return tuple(int(part) for part in site.split(".") if part.isdecimal())


def _dotted(layer: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in layer)


def _site_label(site: str, siblings: list[str]) -> str:
    """The last part of the name, or everything after the layer number if the last part is not unique."""
    last = site.rsplit(".", 1)[-1]
    if sum(sibling.rsplit(".", 1)[-1] == last for sibling in siblings) == 1:
        return last
    parts = site.split(".")
    return ".".join(parts[max(index for index, part in enumerate(parts) if part.isdecimal()) + 1 :])

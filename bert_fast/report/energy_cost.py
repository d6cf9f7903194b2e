"""What energy costs: money and CO2, by the price and the emission factor that a config gives."""

from __future__ import annotations

from typing import TypedDict

JOULES_PER_KWH = 3.6e6


class EnergyCost(TypedDict):
    """kWh, money in the price's currency, and kg of CO2 equivalent; None where the energy or the factor is not known."""

    kwh: float | None
    money: float | None
    kg_co2e: float | None


def energy_cost(kwh: float | None, price_per_kwh: float | None = None, gco2_per_kwh: float | None = None) -> EnergyCost:
    """The cost of `kwh`. `gco2_per_kwh` is grams of CO2 equivalent per kWh."""
    return {
        "kwh": kwh,
        "money": None if kwh is None or price_per_kwh is None else kwh * price_per_kwh,
        "kg_co2e": None if kwh is None or gco2_per_kwh is None else kwh * gco2_per_kwh / 1e3,
    }

"""Write the sensor-diagnosis splits beside this file: `python data/sensors/generate.py`.

Twelve invented machines have operating ranges that no model can know. A
prompt names one machine and three readings; the answer repeats each reading,
says whether it is high, low or ok, names the fault, and what to do. One seed
decides everything, so the files can be made again byte for byte.
"""

import json
import random
from pathlib import Path

SEED = 20261122
HERE = Path(__file__).parent
SIZES = {"train": 5000, "validation": 500, "test": 500, "test_phrasings": 500}

QUANTITIES = ("temperature", "pressure", "vibration", "current", "flow")
# Operating limits (low, high) of each machine, in the first unit of UNITS.
LIMITS: dict[str, tuple[tuple[int, int], ...]] = {
    "Arden pump": ((20, 60), (200, 400), (0, 30), (0, 20), (40, 80)),
    "Bolt press": ((40, 90), (500, 900), (0, 60), (0, 60), (10, 20)),
    "Crane motor": ((30, 110), (100, 300), (0, 80), (0, 120), (20, 40)),
    "Delta fan": ((10, 45), (50, 150), (0, 15), (0, 10), (200, 400)),
    "Ember kiln": ((90, 180), (150, 350), (0, 20), (0, 160), (30, 60)),
    "Falcon turbine": ((60, 140), (800, 1600), (0, 90), (0, 40), (90, 180)),
    "Grove chiller": ((15, 35), (300, 700), (0, 40), (0, 35), (60, 120)),
    "Harbor winch": ((25, 75), (600, 1200), (0, 50), (0, 90), (15, 30)),
    "Iris mixer": ((20, 65), (100, 250), (0, 45), (0, 15), (35, 70)),
    "Jet compressor": ((50, 120), (900, 2000), (0, 70), (0, 100), (70, 140)),
    "Kite conveyor": ((15, 50), (250, 550), (0, 75), (0, 25), (10, 20)),
    "Lumen boiler": ((70, 150), (400, 800), (0, 10), (0, 50), (50, 100)),
}
# Units a quantity comes in: name, factor and offset from the first one.
UNITS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "temperature": (("C", 1.0, 0.0), ("F", 1.8, 32.0)),
    "pressure": (("kPa", 1.0, 0.0), ("bar", 0.01, 0.0)),
    "vibration": (("um", 1.0, 0.0),),
    "current": (("A", 1.0, 0.0),),
    "flow": (("L/min", 1.0, 0.0),),
}
# Fault: (readings out of range, what to do). The name is the keyword.
FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "nominal": ({}, "Keep running."),
    "overheating": ({"temperature": "high"}, "Check the cooling."),
    "freezing": ({"temperature": "low"}, "Turn on the heater."),
    "overpressure": ({"pressure": "high"}, "Open the relief valve."),
    "leak": ({"pressure": "low"}, "Inspect the seals."),
    "bearing wear": ({"vibration": "high"}, "Replace the bearing."),
    "overload": ({"current": "high"}, "Reduce the load."),
    "blockage": ({"flow": "low"}, "Clean the filter."),
    "lubrication failure": (
        {"temperature": "high", "vibration": "high"}, "Refill the oil."),
}
PHRASINGS = (
    "Analyze this sensor reading from the {device}: {readings}",
    "The {device} reports {readings}. What is wrong?",
    "Diagnose the {device}. Readings: {readings}.",
    "{device} status: {readings}. Give a diagnosis.",
    "We see {readings} on the {device}. What should we do?",
    "Check these values of a {device}: {readings}.",
    "Sensor log, {device}: {readings}. Explain.",
    "Is the {device} healthy? It shows {readings}.",
)
UNSEEN_PHRASINGS = (
    "My {device} currently measures {readings}. Any problem?",
    "Maintenance ticket for a {device}. Measured: {readings}. Your verdict?",
    "An operator noted {readings} at the {device}. Please assess.",
    "Given {readings}, how is the {device} doing?",
)


def number(value: float) -> str:
    """At most three decimals, no trailing zeros: 118, 4.2, 0.035."""
    text = f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 20 else f"{value:.0f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def draw(rng: random.Random, limits: tuple[int, int], state: str) -> int:
    """A reading in the stated region, well off its edges."""
    low, high = limits
    span = high - low
    if state == "high":
        return round(high + span * rng.uniform(0.25, 1.0))
    if state == "low":
        return round(low * rng.uniform(0.2, 0.7))
    return round(low + span * rng.uniform(0.15, 0.85))


def example(rng: random.Random, *, device: str, fault: str,
            phrasings: tuple[str, ...]) -> dict[str, str]:
    """One record: prompt, answer, keyword, machine and fault."""
    wrong, action = FAULTS[fault]
    others = [q for q in QUANTITIES if q not in wrong]
    shown = list(wrong) + rng.sample(others, 3 - len(wrong))
    rng.shuffle(shown)
    readings, verdicts = [], []
    for quantity in shown:
        limits = LIMITS[device][QUANTITIES.index(quantity)]
        state = wrong.get(quantity, "ok")
        unit, factor, offset = UNITS[quantity][0]
        if rng.random() < 0.2:
            unit, factor, offset = UNITS[quantity][-1]
        value = number(draw(rng, limits, state) * factor + offset)
        readings.append(f"{quantity} {value} {unit}")
        verdicts.append(f"{quantity} {value} {state}")
    text = rng.choice(phrasings).format(
        device=device, readings=", ".join(readings))
    answer = ", ".join(verdicts)
    return {
        "instruction": text,
        "response": f"{answer[0].upper()}{answer[1:]}: {fault}. {action}",
        "expected_keyword": fault,
        "device": device,
        "fault": fault,
    }


def make_split(name: str, seen: set[str]) -> list[dict[str, str]]:
    """A split with every machine and fault in turn; no prompt of `seen`."""
    rng = random.Random(f"{SEED}-{name}")
    phrasings = UNSEEN_PHRASINGS if name == "test_phrasings" else PHRASINGS
    pairs = [(d, f) for d in LIMITS for f in FAULTS]
    records: list[dict[str, str]] = []
    while len(records) < SIZES[name]:
        if len(records) % len(pairs) == 0:
            rng.shuffle(pairs)
        device, fault = pairs[len(records) % len(pairs)]
        record = example(rng, device=device, fault=fault, phrasings=phrasings)
        if record["instruction"] not in seen:
            seen.add(record["instruction"])
            records.append(record)
    return records


def main() -> None:
    """Write every split as JSON lines."""
    seen: set[str] = set()
    for name in SIZES:
        lines = [json.dumps(r) for r in make_split(name, seen)]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write the sensor-diagnosis splits beside this file: `python data/sensors/generate.py`.

Twelve invented machines have operating limits that no model can know. A
prompt names one machine and three readings. The answer names the machine and
its duty, gives each reading with its limit and a verdict, and names the fault
and what to do. One seed
decides everything, so the files can be made again byte for byte.
"""

import json
import random
from pathlib import Path

SEED = 20261122
HERE = Path(__file__).parent
SIZES = {"train": 5000, "validation": 500, "test": 500, "test_phrasings": 500}

QUANTITIES = ("temperature", "pressure", "vibration", "current", "flow")
# Each quantity has one limit: a most or a least, by duty, in its first unit.
KINDS = {"temperature": "max", "pressure": "min", "vibration": "max",
         "current": "max", "flow": "min"}
DUTIES: dict[str, dict[str, int]] = {
    "light": {"temperature": 40, "pressure": 90, "vibration": 10, "current": 15, "flow": 20},
    "medium": {"temperature": 120, "pressure": 300, "vibration": 40, "current": 60, "flow": 80},
    "heavy": {"temperature": 400, "pressure": 1000, "vibration": 150, "current": 250,
              "flow": 300},
}
# The duty of each machine: what only the examples can tell.
MACHINES: dict[str, str] = {
    "Arden pump": "light", "Bolt press": "heavy", "Crane motor": "medium",
    "Delta fan": "light", "Ember kiln": "heavy", "Falcon turbine": "medium",
    "Grove chiller": "medium", "Harbor winch": "heavy", "Iris mixer": "light",
    "Jet compressor": "heavy", "Kite conveyor": "light", "Lumen boiler": "medium",
}
LIMITS = {machine: DUTIES[duty] for machine, duty in MACHINES.items()}
# Units a quantity comes in: name, factor and offset from the first one.
UNITS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "temperature": (("C", 1.0, 0.0), ("F", 1.8, 32.0)),
    "pressure": (("kPa", 1.0, 0.0), ("bar", 0.01, 0.0)),
    "vibration": (("um", 1.0, 0.0),),
    "current": (("A", 1.0, 0.0),),
    "flow": (("L/min", 1.0, 0.0),),
}
# Fault: (readings beyond their limit, what to do). The name is the keyword.
FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "nominal": ((), "Keep running."),
    "overheating": (("temperature",), "Check the cooling."),
    "leak": (("pressure",), "Inspect the seals."),
    "bearing wear": (("vibration",), "Replace the bearing."),
    "overload": (("current",), "Reduce the load."),
    "blockage": (("flow",), "Clean the filter."),
    "lubrication failure": (("temperature", "vibration"), "Refill the oil."),
    "short circuit": (("temperature", "current"), "Cut the power."),
    "dry running": (("pressure", "flow"), "Stop and refill."),
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


def draw(rng: random.Random, limit: int, kind: str, bad: bool) -> int:
    """A reading well within or well beyond its limit."""
    above = bad == (kind == "max")
    return round(limit * (rng.uniform(1.4, 3) if above else rng.uniform(0.25, 0.75)))


def example(rng: random.Random, *, device: str, fault: str,
            phrasings: tuple[str, ...]) -> dict[str, str]:
    """One record: prompt, answer, keyword, machine and fault."""
    wrong, action = FAULTS[fault]
    others = [q for q in QUANTITIES if q not in wrong]
    shown = list(wrong) + rng.sample(others, 3 - len(wrong))
    rng.shuffle(shown)
    readings, verdicts = [], []
    for quantity in shown:
        limit, kind = LIMITS[device][quantity], KINDS[quantity]
        bad = quantity in wrong
        unit, factor, offset = UNITS[quantity][0]
        if rng.random() < 0.15:
            unit, factor, offset = UNITS[quantity][-1]
        value = number(draw(rng, limit, kind, bad) * factor + offset)
        readings.append(f"{quantity} {value} {unit}")
        verdict = ("high" if kind == "max" else "low") if bad else "ok"
        edge = number(limit * factor + offset)
        verdicts.append(f"{quantity} {value} {kind} {edge} {verdict}")
    text = rng.choice(phrasings).format(
        device=device, readings=", ".join(readings))
    answer = f"{device}, {MACHINES[device]} duty: {', '.join(verdicts)}"
    return {
        "instruction": text,
        "response": f"{answer}: {fault}. {action}",
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
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8",
                                           newline="\n")


if __name__ == "__main__":
    main()

"""Records of figures: read, judged, and put in a table. Shared by `run` and `report`; the standard library only.

A record says what was measured beside what: `figure, model, dtype, unit, ours, reference, reference_name, ratio, target,
outputs_checked, outputs_wrong, device`. `ratio` is ours divided by the reference. `target` is `{"at_most": x}`,
`{"at_least": x}` or null, and is about the ratio where there is a reference, else about our value.
"""
import json, pathlib, statistics

KEYS = {"figure", "model", "dtype", "unit", "ours", "reference", "reference_name", "ratio", "target",
        "outputs_checked", "outputs_wrong", "device"}
# May be left out by who writes a record by hand.
OPTIONAL = {"unit"}

TITLES = {
    "swap_in_bandwidth": "Swap-in bandwidth",
    "swapped_in_request": "Swapped-in request, pipelined",
    "swapped_in_request_paced": "The same beside what it needs, after the same pause",
    "resident_run_to_session": "Resident run beside a plain session",
    "resident_run_to_eager": "Resident run beside PyTorch eager",
    "resident_run_to_graph": "Resident run beside a PyTorch CUDA graph",
    "resident_run_to_compiled": "Resident run beside torch.compile",
    "resident_run_to_compiled_graph": "Resident run beside torch.compile as a CUDA graph",
    "request_to_new_session": "Swapped-in request beside a new session per load",
    "request_to_pinned_load": "Swapped-in request beside model.cuda(), pinned",
    "request_to_pageable_load": "Swapped-in request beside model.cuda(), pageable",
    "bind": "Binding a function",
    "bind_by_kind": "Binding a function by its kind",
    "four_lanes": "Requests per second, four lanes beside one",
    "four_streams_torch": "The same of PyTorch's CUDA graphs, in four streams beside one",
    "peer_swap_bandwidth": "Swap-in from another GPU",
    "peer_swap_request": "Request whose weights come from another GPU",
    "two_link_load": "Loading over two GPUs' links",
    "three_link_load": "Loading over three GPUs' links",
    "four_link_load": "Loading over four GPUs' links",
    "two_swaps_at_once": "A swap on each of two GPUs at once",
    "swaps_on_all_at_once": "A swap on each of more GPUs at once",
    "mapping_beside_own_copies": "Mapping memory beside copies to the same GPU",
    "mapping_beside_others_copies": "Mapping memory beside copies to another GPU",
    "open_batch_run": "Run of a model with an open batch, as a program",
    "stress_wrong_outputs": "Wrong outputs under constant eviction",
    "stress_memory_growth": "GPU memory grown under constant eviction",
    "stress_process_growth": "The process's own memory grown meanwhile",
    "disk_to_host_bandwidth": "Reading weights from disk",
    "swap_in_from_disk": "Swap-in of weights that are read from disk meanwhile",
    "device_memory_per_function": "Device memory per bound function",
    "chunk_waste": "What chunks take beyond the weights of all models",
    "device_memory_to_process": "The same beside a process with a session of its own",
    "host_memory_per_function": "Host memory per function and device, beyond weights",
    "density_requests": "Requests per second per device, 95% of functions compliant, by policy",
    "density_of_optimum": "That, as a share of what the links could carry at most",
    "density_compliant": "Functions compliant at the first rate, by policy",
    "density_registered": "All functions registered and bound, prepared before",
    "density_unanswered": "Requests refused or lost under load",
    "predicted_compliant": "Compliant functions at the most that is carried, beside the simulator's",
    "predicted_p50": "p50 there, beside the simulator's",
    "predicted_p98": "p98 there, beside the simulator's",
    "predicted_swaps": "Swap-ins per second there, beside the simulator's",
    "predicted_link_load": "Load of the links there, beside the simulator's",
    "scale_requests": "Requests per second, 95% of functions compliant, by number of devices",
    "scale_of_optimum": "That, as a share of what links or devices could carry at most",
    "scale_compliant": "Functions compliant at the published rates, by number of devices",
    "soak_requests": "Requests per second of the long run",
    "soak_device_memory_growth": "Device memory grown in the long run",
    "soak_broker_memory_growth": "The broker's memory grown in the long run",
    "front_http_added_resident": "Added by sidecar and broker, weights there",
    "front_http_added_swapped_in": "Added by sidecar and broker, weights swapped in",
    "front_client_added_resident": "Added by the Rust client and the broker, weights there",
    "front_client_added_swapped_in": "Added by the Rust client and the broker, weights swapped in",
    "front_broker_added_resident": "Added within the broker, weights there",
    "front_broker_added_swapped_in": "Added within the broker, weights swapped in",
    "front_bare_exchange": "As many bytes through a bare connection, and a word to another thread, which sleeps as long as the broker took",
    "front_bare_exchange_first": "The same first after other requests, as those whose weights are swapped in",
    "lose_others_missed": "A device lost: late or refused requests of functions that were elsewhere too",
    "lose_refused": "A device lost: requests refused",
    "lose_refused_later": "A device lost: requests refused that came afterwards",
    "lose_theirs_p98": "A device lost: p98 of its functions afterwards",
    "lose_unanswered": "A device lost: requests without any answer",
}


class Bad(Exception):
    """A file that is not what it should be."""


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check(record):
    """The record, or what is wrong with it."""
    if not isinstance(record, dict):
        raise Bad("a record is no object")
    missing, unknown = KEYS - OPTIONAL - record.keys(), record.keys() - KEYS
    if missing or unknown:
        raise Bad(f"a record lacks {sorted(missing)} and has {sorted(unknown)} beside what it should")
    for key in ("figure", "model", "dtype", "device"):
        if not isinstance(record[key], str):
            raise Bad(f"{key} is {record[key]!r}, no text")
    if not number(record["ours"]):
        raise Bad(f"ours is {record['ours']!r}, no number")
    for key in ("reference", "ratio"):
        if record[key] is not None and not number(record[key]):
            raise Bad(f"{key} is {record[key]!r}, no number")
    for key in ("outputs_checked", "outputs_wrong"):
        if not isinstance(record[key], int) or isinstance(record[key], bool) or record[key] < 0:
            raise Bad(f"{key} is {record[key]!r}, no count")
    target = record["target"]
    if target is not None and not (isinstance(target, dict) and len(target) == 1
                                   and set(target) <= {"at_most", "at_least"} and number(*target.values())):
        raise Bad(f"target is {target!r}")
    return {"unit": "", **record}


def load(path):
    """The records of one file: a list of them, or a result with a list under `records`."""
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Bad(f"{path}: {error}") from error
    records = found.get("records") if isinstance(found, dict) else found
    if not isinstance(records, list):
        raise Bad(f"{path}: no list of records")
    try:
        return [check(record) for record in records]
    except Bad as error:
        raise Bad(f"{path}: {error}") from error


def judged(record):
    """What the target is about."""
    return record["ours"] if record["ratio"] is None else record["ratio"]


def verdict(record):
    """`wrong`, `met`, `missed`, or `told` where there is no target."""
    if record["outputs_wrong"]:
        return "wrong"
    target = record["target"]
    if target is None:
        return "told"
    value = judged(record)
    met = value <= target["at_most"] if "at_most" in target else value >= target["at_least"]
    return "met" if met else "missed"


def wrong_in(value):
    """How many wrong outputs are counted anywhere in a JSON value: also by who writes no records."""
    if isinstance(value, dict):
        here = value.get("outputs_wrong", 0)
        own = here if number(here) else 0
        return own + sum(wrong_in(part) for key, part in value.items() if key != "outputs_wrong")
    if isinstance(value, list):
        return sum(wrong_in(part) for part in value)
    return 0


def short(value):
    """A number with three or so digits that say something."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def target_text(target):
    if target is None:
        return "-"
    return f"<= {target['at_most']:g}" if "at_most" in target else f">= {target['at_least']:g}"


def figures(records):
    """The figures in the order of `TITLES`, then others as they come, each with its records by model and dtype."""
    names = [name for name in TITLES if any(record["figure"] == name for record in records)]
    names += dict.fromkeys(record["figure"] for record in records if record["figure"] not in TITLES)
    order = lambda record: (record["model"], record["dtype"])
    return [(name, sorted((r for r in records if r["figure"] == name), key=order)) for name in names]


def title(figure):
    return TITLES.get(figure, figure.replace("_", " "))


def median(records):
    """The median of what the target is about."""
    return statistics.median(judged(record) for record in records)


def table(records):
    """All records as text, one a line."""
    head = ("figure", "model", "dtype", "ours", "reference", "ratio", "target", "", "outputs")
    rows = [head]
    for name, group in figures(records):
        for record in group:
            outputs = f"{record['outputs_wrong']}/{record['outputs_checked']} wrong" if record["outputs_checked"] else ""
            rows.append((name, record["model"], record["dtype"], f"{short(record['ours'])} {record['unit']}".strip(),
                         short(record["reference"]), short(record["ratio"]), target_text(record["target"]),
                         verdict(record), outputs))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

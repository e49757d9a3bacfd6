"""The figures of `mmsr bench engine` for a reader."""


def table(record: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{record['dtype']} on {record['device']}, {record['threads']} threads, load "
        f"{record['load_before']:.1f} to {record['load_after']:.1f}, {record['date']}",
        versions,
        f"peer: {record['peer'] or 'none'}",
    ]
    if "decode" in record:
        lines += ["", *_decode(record["decode"])]
    if "replay" in record:
        lines += ["", *_replay(record["replay"])]
    return "\n".join(lines)


def _decode(cases: list[dict]) -> list[str]:
    lines = [
        "decoding, tokens a second of all rows: fastest run (median)",
        f"{'size':>6} {'rows':>5} {'context':>8} {'ours':>17} {'peer':>17} {'ratio':>7} "
        f"{'memory allows':>14} {'of it':>6}  peer's way",
    ]
    for case in cases:
        peer, way = "", ""
        ratio = f"{case['ratio']:.2f}" if "peer" in case else ""
        if "peer" in case:
            peer = _speed(case["peer"])
            way = f"{case['peer_way']['cache']} cache, {case['peer_way']['threads']} threads"
        lines.append(
            f"{case['size']:>6} {case['rows']:>5} {case['context']:>8} {_speed(case['ours']):>17} "
            f"{peer:>17} {ratio:>7} {case['floor_tokens_per_s']:>14.0f} {case['of_floor']:>6.0%}  "
            f"{way}".rstrip()
        )
    return lines


def _speed(side: dict) -> str:
    return f"{side['tokens_per_s']:.0f} ({side['median_tokens_per_s']:.0f})"


def _replay(record: dict) -> list[str]:
    sizes = record["engine"]
    lines = [
        f"replay, {record['size']}: {record['traces']} conversations of {record['prompts']} "
        f"prompts, {record['turns']} turns, {record['tokens']} tokens to say; {sizes['rows']} "
        f"rows, {sizes['flight']} in flight, {sizes['pages']} pages of {sizes['page']}",
        f"tools: {_latency(record['latency'])}",
    ]
    names = {
        "instant": "ours, instant tools",
        "slow": "ours, slow tools",
        "barrier": "barrier, batch of the rows",
        "barrier_large": "barrier, batch of the flight",
    }
    if any(name in record for name in names):
        lines.append(
            f"{'':>28} {'seconds':>8} {'tokens/s':>9} {'rows used':>10} {'no work':>8} "
            f"{'fed/distinct':>13} {'dropped':>8} {'pictures':>9}"
        )
    for name, words in names.items():
        if name not in record:
            continue
        run = record[name]
        pictures = f"{run['encoded_pictures']}/{run['distinct_pictures']}"
        lines.append(
            f"{words:>28} {run['seconds']:>8.2f} {run['tokens_per_s']:>9.0f} "
            f"{run['occupancy']:>10.0%} {run['no_work_share']:>8.0%} {run['prefill_ratio']:>13.3f} "
            f"{run['dropped']:>8} {pictures:>9}"
        )
    if "slow" in record:
        steady = record["slow_by_instant_steady"]
        lines.append(
            f"slow by instant tools, tokens a second: {record['slow_by_instant']:.2f}"
            + (f" (until the last prompt had come in: {steady:.2f})" if steady else "")
        )
    for name in ("barrier", "barrier_large"):
        if name in record:
            times = record[f"faster_than_{name}"]
            lines.append(f"faster than the {names[name]}: {times:.2f} times")
    if "loop" in record:
        loop = record["loop"]
        lines.append(f"plain loop of transformers, {loop['traces']} conversations:")
        for words, theirs, ours, ratio in (
            ("instant tools, batch of the rows", "peer", "ours", "ratio"),
            ("slow tools, batch of the rows", "peer_slow", "ours_slow", "ratio_slow"),
            ("instant tools, one at a time", "peer_single", "ours", "ratio_single"),
        ):
            lines.append(
                f"  {words:>32}: {loop[theirs]['seconds']:.2f} s, ours "
                f"{loop[ours]['seconds']:.2f} s: {loop[ratio]:.2f} times faster"
            )
    return lines


def _latency(late: dict) -> str:
    """Seconds as they were slept, scaled."""
    how, most = "", "deadline"
    if late["recorded"]:
        if not late["calls"]:
            return "none was called"
        how, most = f"{late['calls']} calls as recorded, times {late['scale']:g}: ", "largest"
    seconds = (late["scale"] * late[name] for name in ("median", "p99", most))
    return how + "median {:.4g} s, p99 {:.4g} s, at most {:.4g} s".format(*seconds)

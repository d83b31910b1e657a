"""Make the table of `benchmarks/README.md` from the files in `benchmarks/results`.

    python benchmarks/table.py                        the table only
    python benchmarks/table.py results.jsonl          files from the lines of a run, then the table

A run of several systems by turns is a file with one JSON line per entry and round: what a script
prints, with `name` (of the comparison), `round` and `env` ("ours", or another for other systems and
older code). Ratios are formed inside each round: items per second of ours over theirs.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _results import HERE, RESULTS, about, save, write

README = HERE / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD = ("job, precision, mode", "items/s", "over others: median [min, max]", "memory, MiB", "MFU")
PLAIN = {"unclip_pl", "trainer", "bare"}
"""Parts of `impl` that are no special setting."""
SAID = PLAIN | {"compiled", "selective", "full", "cuda_graphs"}
"""Parts of `impl` that the row says in other words, or need not say."""


def add(path: Path, folder: Path) -> None:
    """Write the lines of a run to results: ours, and those of what it is set against."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    first = next((line for line in lines if "machine" in line), None) or about()
    for line in lines:
        for key in ("machine", "cores"):
            line.setdefault(key, first[key])
        line.setdefault("mode", "eager")
        line["job"] = re.sub(r"_(fp32|bf16)$", "", line.pop("name", line["job"]))
        parts, env = line["impl"].split("/"), line.get("env", "ours")
        if parts[0] == "unclip_pl" and env != "ours":  # other code of ours, such as older
            line["impl"] = "/".join([env, *(part for part in parts if part not in PLAIN)])
        save({key: value for key, value in line.items() if key not in ("gemm", "args")}, folder)


def is_ours(result: dict[str, Any]) -> bool:
    """Whether a measurement is of this project (`impl` begins with "unclip_pl")."""
    return result["impl"].split("/")[0] == "unclip_pl"


def is_plain(result: dict[str, Any]) -> bool:
    """Nothing is switched on."""
    return set(result["impl"].split("/")) <= PLAIN


def comparable(result: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of one job and machine; ours is set against other systems and against ours in plain mode."""
    same = ("job", "machine", "dtype", "device", "threads")
    if other is result or any(result.get(key) != other.get(key) for key in same):
        return False
    return not is_ours(other) or (is_plain(other) and not is_plain(result))


def ratios(result: dict[str, Any], others: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Items per second over those of each other entry: median, smallest, largest, per round."""
    over = {}
    rates = {str(each["round"]): each["items_per_s"] for each in result["rounds"]}
    for other in others:
        theirs = {str(each["round"]): each["items_per_s"] for each in other["rounds"]}
        shared = {r: rate / theirs[r] for r, rate in rates.items() if theirs.get(r)}
        if values := list(shared.values()):
            over["eager" if is_ours(other) else other["impl"]] = {
                "median": statistics.median(values), "min": min(values), "max": max(values),
                "per_round": shared,
                "memory": peak(result) / max(1.0, peak(other)),
            }  # fmt: skip
    return over


def peak(result: dict[str, Any]) -> float:
    """MiB, the median of the rounds."""
    return statistics.median(map(memory, result["rounds"]))


def memory(measured: dict[str, Any]) -> float:
    """MiB of a round: of the GPU, or of the process without its imports."""
    if "peak_cuda_mib" in measured:
        return measured["peak_cuda_mib"]
    return measured["peak_rss_mib"] - (measured.get("rss_before_mib") or 0)


def row(result: dict[str, Any]) -> str:
    """Of the table."""
    rounds = result["rounds"]
    mode = [result["mode"]]
    if result.get("checkpointing", "none") != "none":
        mode.append(f"{result['checkpointing']} checkpointing")
    if result.get("cuda_graphs"):
        mode.append("CUDA graphs")
    mode += [part for part in result["impl"].split("/") if part not in SAID]
    over = [
        f"{other} {r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}], memory {r['memory']:.2f}"
        for other, r in result.get("over", {}).items()
    ]
    rate = statistics.median(each["items_per_s"] for each in rounds)
    shares = [each["mfu"] for each in rounds if "mfu" in each]
    cells = [
        f"{result['job']}, {result['dtype']}, {', '.join(mode)}",
        f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
        "; ".join(over),
        f"{peak(result):,.0f}",
        f"{statistics.median(shares):.2f}" if shares else "",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: list[dict[str, Any]]) -> str:
    """One table, with a line for each machine, version of torch and commit above its rows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if is_ours(result):
            where = "{machine}; threads: {threads}; torch {torch}; commit {commit}".format_map(
                result
            )
            groups.setdefault(where, []).append(result)
    if not groups:
        return "There are no results yet."
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for where, group in sorted(groups.items()):
        lines.append(f"| **{where}** |" + " |" * (len(HEAD) - 1))
        group.sort(key=lambda r: (r["job"], r["dtype"], not is_plain(r), r["impl"]))
        lines += map(row, group)
    return "\n".join(lines)


def main() -> None:
    """Add the runs to the results, form all ratios again, and write the table to the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="JSON lines of runs by turns")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README, help="the file with the markers")
    arguments = parser.parse_args()
    for run in arguments.runs:
        add(run, arguments.results)
    paths = sorted(arguments.results.glob("*.json"))
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    timed = {path: result for path, result in results.items() if "rounds" in result}
    for path, result in timed.items():
        if is_ours(result):
            others = [other for other in timed.values() if comparable(result, other)]
            over = ratios(result, others)
            if over != result.get("over"):
                write(path, result | {"over": over})
                result["over"] = over
    markdown = table(list(timed.values()))
    text = arguments.readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    arguments.readme.write_text(f"{before}{BEGIN}\n{markdown}\n{END}{after}", encoding="utf-8")
    for path in sorted(arguments.results.glob("errors/*.json")):
        failed = json.loads(path.read_text(encoding="utf-8"))
        print(f"failed: {failed['job']} on {failed['machine']}: {failed['error']}")
    print(f"{len(timed)} files of measurements; the table is in {arguments.readme}")


if __name__ == "__main__":
    main()

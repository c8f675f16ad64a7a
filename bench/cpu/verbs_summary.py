"""google-benchmark JSON on stdin -> one JSON object a line, as bench/results/cpu-verbs.jsonl keeps it."""

import json
import platform
import sys

report = json.load(sys.stdin)
for row in report["benchmarks"]:
    if "error_message" in row:
        sys.exit(f"{row['name']}: {row['error_message']}")
    line = {"date": report["context"]["date"][:10], "machine": platform.machine(), "threads": 1, "bench": row["name"]}
    print(json.dumps(line | {"us_per_tile": round(1e6 * row["seconds_per_tile"], 2)}))

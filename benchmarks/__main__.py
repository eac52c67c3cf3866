"""`pdm run bench NAME`：跑一个基准，印出表格，写下 benchmarks/results/NAME.json；有一项没达到就以 1 退出。"""

from __future__ import annotations

import sys

import click

from benchmarks.burst.bench import bench_burst
from benchmarks.dagster.bench import bench_dagster
from benchmarks.dagster.overrides import bench_overrides
from benchmarks.etl.bench import bench_etl
from benchmarks.growth.bench import bench_growth
from benchmarks.importing.bench import bench_import
from benchmarks.latency.bench import bench_latency
from benchmarks.latency.poison import bench_poison
from benchmarks.rest.bench import bench_rest
from benchmarks.retention.bench import bench_retention
from benchmarks.rush.bench import bench_rush
from benchmarks.scale.bench import bench_scale


@click.group()
def main() -> None:
    """Benchmarks on servers that they start themselves; sides are interleaved in one run."""


main.add_command(bench_etl, "etl")
main.add_command(bench_import, "import")
main.add_command(bench_dagster, "dagster")
main.add_command(bench_overrides, "overrides")
main.add_command(bench_latency, "latency")
main.add_command(bench_burst, "burst")
main.add_command(bench_poison, "poison")
main.add_command(bench_growth, "growth")
main.add_command(bench_rush, "rush")
main.add_command(bench_retention, "retention")
main.add_command(bench_rest, "rest")
main.add_command(bench_scale, "scale")

if __name__ == "__main__":
    sys.exit(main())

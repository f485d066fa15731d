import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_bench_measures_every_case() -> None:
    command = [sys.executable, "bench/integrations.py", "sae_lens", "--shape", "260,16,512,4"]
    done = subprocess.run(
        [*command, "--steps", "1", "--json", "-"], cwd=ROOT, stdout=-1, check=True
    )
    rows = json.loads(done.stdout)
    assert len(rows) == 7 and len({row["case"] for row in rows}) == 7
    for row in rows:
        assert [row[size] for size in "ndfk"] == [260, 16, 512, 4]
        assert row["ratio"] == row["before"]["s"] / row["after"]["s"]

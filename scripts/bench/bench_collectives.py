"""What share of a link's declared speed gloo's collectives reach, by size: the basis of the
doctor's bandwidth check.

    python scripts/bench/bench_collectives.py [--output FILE]   two hosts; root; two minutes

Brings up two hosts (scripts/local_cluster.sh) whose links are limited to each of several speeds, or
are as fast as this machine copies, and times the doctor's own all-reduce and all-gather
(launcher/doctor/on_host.py) with one rank on each. The declared speed is the limit, or what the
kernel says of the interface. Prints and writes the share of it that each size reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
CLUSTER = [str(REPO / "scripts/local_cluster.sh"), "--name", f"c{os.getpid() % 10**6}"]
# megabits a second; None: as the kernel says
RATES = {"100mbit": 100, "1gbit": 1000, "2gbit": 2000, "": None}
SIZES = [2**16, 2**20, 2**22, 2**24, 2**26]
ROUNDS = 3


def rank(number: int) -> None:
    """One rank: the sizes in turn, a few rounds; rank 0 prints the best of each."""
    sys.path.insert(0, str(REPO))
    from grads_ds.launcher.doctor.on_host import collectives, link_speed

    found: dict[str, Any] = {"megabits": link_speed("eth0"), "sizes": {}}
    for size in SIZES:
        rounds = [collectives(number, 2, size) for _ in range(ROUNDS)]
        names = ("all_reduce", "all_gather")
        found["sizes"][size] = {
            name: max(r[name]["bytes_per_second"] for r in rounds) for name in names
        }
    if number == 0:
        print(json.dumps(found), flush=True)
    os._exit(0)


def measured(address: str) -> dict[str, Any]:
    """Both ranks on the two hosts."""
    ranks = []
    for number in (0, 1):
        environment = os.environ | {
            "RANK": str(number),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": "29555",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            *CLUSTER,
            "exec",
            str(number + 1),
            sys.executable,
            str(Path(__file__).resolve()),
            "--rank",
            str(number),
        ]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    output = [process.communicate(timeout=300)[0] for process in ranks]
    return dict(json.loads(output[0].splitlines()[-1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return rank(options.rank)
    rows = []
    subprocess.run([*CLUSTER, "up", "2"], check=True, stdout=subprocess.DEVNULL)
    try:
        hostfile = Path(f"/tmp/local_cluster.{CLUSTER[-1]}/hostfile").read_text()
        address = hostfile.split()[0]
        for rate, megabits in RATES.items():
            subprocess.run(
                [*CLUSTER, *(["--rate", rate] if rate else []), "shape"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found = measured(address)
            link = (megabits or found["megabits"]) * 1e6 / 8
            for size, speeds in found["sizes"].items():
                shares = {name: round(speed / link, 3) for name, speed in speeds.items()}
                rows.append(
                    {
                        "link": rate or f"veth, {found['megabits']} Mbit/s by the kernel",
                        "kib": int(size) // 1024,
                        **shares,
                    }
                )
                print(rows[-1], flush=True)
    finally:
        subprocess.run([*CLUSTER, "down"], check=True)
    if options.output:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu_cores": os.cpu_count(),
            "ranks": 2,
            "backend": "gloo",
        }
        options.output.write_text(json.dumps(about | {"shares": rows}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()

"""Watch long runs: whether memory, open files or the cost of a step grow. Fills results/long_run.csv, for table.py.

    python benchmarks/long_run.py --minutes 30

Each sample is a line: resident memory, open files, and processor seconds per 1,000 steps since the sample before. That
is the run's own cost, whatever else the machine does. Steps are read from the run's log.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
COMMANDS = {
    "ppo.py": "ppo.py --total-timesteps 2000000000",
    "ppo_jax.py": "ppo_jax.py --total-timesteps 2000000000",
    "ppo_jax.py, host": "ppo_jax.py --total-timesteps 2000000000 --env-backend gymnasium",
}


def sample(pid: int) -> tuple[float, int, float]:
    """Resident memory [MB], open files, and processor time so far [s] of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd")), seconds  # noqa: PTH208


def main(minutes: float = 30, every: float = 60, out: Path = HERE / "results" / "long_run.csv"):
    """Run all commands side by side for so many minutes, and look at them `every` so many seconds."""
    rows, processes, logs, before = [], {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in COMMANDS.items():
            cwd = Path(folder, name.replace(", ", "-"))
            cwd.mkdir()
            script, *flags = command.split()
            line = [sys.executable, HERE.parent / script, *flags]
            processes[name] = subprocess.Popen(line, cwd=cwd, stderr=subprocess.DEVNULL)
        try:
            start = time.monotonic()
            while time.monotonic() - start < 60 * minutes:
                time.sleep(every)
                for name, process in processes.items():
                    if name not in logs:
                        (run_dir,) = Path(folder, name.replace(", ", "-")).glob("runs/*")
                        logs[name] = EventAccumulator(str(run_dir), size_guidance={"scalars": 1})
                    steps = logs[name].Reload().Scalars("charts/SPS")[-1].step
                    memory, files, seconds = sample(process.pid)
                    last_steps, last_seconds = before.get(name, (0, 0.0))
                    cost = (seconds - last_seconds) / max(steps - last_steps, 1) * 1000
                    before[name] = steps, seconds
                    row = {"run": name, "minute": f"{(time.monotonic() - start) / 60:.1f}", "step": steps}
                    rows.append(row | {"memory": f"{memory:.1f}", "files": files, "seconds_per_1000": f"{cost:.4f}"})
                with out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
        finally:
            for process in processes.values():
                process.terminate()
                process.wait()


if __name__ == "__main__":
    tyro.cli(main)

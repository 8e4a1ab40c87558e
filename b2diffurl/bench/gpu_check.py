"""What a first run on a GPU meets, tried in at most 25 minutes: `python -m b2diffurl.bench --gpu-check --out DIR`.

SD v1.4's geometry with random weights in fp16 and bf16, several processes against one, and the default `shapes` run.
Every check is in DIR/gpu_check.txt and DIR/gpu_check.json as soon as it has ended. Without a GPU the same code runs at
the size of the shapes world.
"""

import datetime
import pathlib
import tempfile
import time
import traceback

import torch

from ..run import storage
from ..run.folder import versions
from . import meter, random_weights
from .driver_checks import fused_run, several_processes, shapes_run
from .precision_checks import Precision, configure

LIMIT, LATEST = 25 * 60, 22 * 60  # seconds from the start until everything has ended, and until the last check begins
CHECKS = {  # of a Precision, in this order: how many seconds each may take
    "memory": 90, "largest_batches": 120, "throughput": 180, "first_pass": 120, "updates": 120,
}  # fmt: skip


def main(folder):
    """Make all checks, with their files in a folder -> exit code: 1 if one failed."""
    cuda, report = torch.cuda.is_available(), Report(folder)
    report.say(meter.machine() if cuda else "no CUDA device here: the same code at small size, on the CPU")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        scratch = pathlib.Path(scratch)
        precisions = ("fp16", "bf16") if cuda else ("bf16", "no")
        if cuda and not report.check("random weights", 180, lambda: random_weights.write(scratch, "fp16", "ViT-H-14")):
            precisions = ()
        for precision in precisions:
            own = Precision(configure(precision, scratch), scratch / precision)
            for name, seconds in CHECKS.items():
                title = f"{'float32' if precision == 'no' else precision}: {name.replace('_', ' ')}"
                report.check(title, seconds, getattr(own, name))
            del own  # and with it the models
        report.check("several processes", 180, lambda: several_processes(scratch))
        report.check("D-Fusion run", 120, lambda: fused_run(scratch))
        report.check("shapes run", 300, lambda: shapes_run(scratch))
    return report.end()


class Report:
    """The checks' outcomes: printed, and written to gpu_check.txt and gpu_check.json, one by one."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.began, self.checks = folder, time.monotonic(), []
        self.facts = {"date": str(datetime.date.today()), "machine": meter.machine(), "versions": versions()}
        (folder / "gpu_check.txt").write_text("", encoding="utf-8")

    def say(self, text):
        """Print the text, and add it to gpu_check.txt."""
        print(text, flush=True)
        with (self.folder / "gpu_check.txt").open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")

    def check(self, name, budget, work):
        """Run work() -> (lines, figures) or None, for `budget` seconds at most -> whether it went well."""
        began = time.monotonic()
        row = {"check": name, "outcome": "skipped", "budget_s": budget}
        if began - self.began > LATEST:
            lines = [f"{LATEST // 60} minutes have passed"]
        else:
            try:
                meter.release()  # what the check before it has left
                with meter.within(min(budget, self.began + LIMIT - began)):
                    lines, row["figures"] = work() or ([], {})
                row["outcome"] = "passed"
            except Exception as error:  # whatever it is, the other checks go on
                row |= {"outcome": "FAILED", "traceback": traceback.format_exc()}
                lines = f"{type(error).__name__}: {error}".strip().splitlines()[:5]
        row |= {"seconds": round(time.monotonic() - began, 1), "lines": lines}
        self.checks.append(row)
        self.say("\n    ".join([f"{row['outcome']:<8}{name}, {row['seconds']} s (at most {budget})", *lines]))
        storage.write_json(self.folder / "gpu_check.json", {**self.facts, "checks": self.checks})
        return row["outcome"] == "passed"

    def end(self):
        """Say how it went -> exit code."""
        count = {outcome: sum(row["outcome"] == outcome for row in self.checks) for outcome in ("passed", "FAILED")}
        skipped, minutes = len(self.checks) - sum(count.values()), (time.monotonic() - self.began) / 60
        self.say(f"{count['passed']} passed, {count['FAILED']} failed, {skipped} skipped; {minutes:.1f} minutes")
        return 1 if count["FAILED"] else 0

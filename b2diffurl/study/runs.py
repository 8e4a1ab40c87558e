"""Running the study's matrix: each run's stages and evaluations, in worker processes, from where they were stopped."""

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time

from ..average import evaluated as averaged
from ..errors import UserError
from ..evaluate import before_after
from ..models import Models
from ..rewards import clip_of
from ..run import lock, metrics, processes, storage
from ..run.folder import Run
from ..run.prompts import read_prompts
from ..shapes.variety import open_entropy
from ..stages.loop import run_stage
from . import report, results
from .matrix import configure, evaluated, matrix


def measure(config, checkpoint, loaded):
    """{figure: value} of a checkpoint folder (None: the base model) on the fixed evaluation noise.

    Figures: reward, oracle, diversity and entropy (bits), each with _train and with _test. loaded: the run's Models.
    """
    lists = {"train": read_prompts(config.prompts.train), "test": read_prompts(config.prompts.test)}
    images = before_after.generate(loaded.evaluating(), lists, checkpoint, config.exp_name)
    values = {}
    for name, prompts in lists.items():
        with loaded.scoring() as reward:
            clip = clip_of(reward, config, processes.device())
            scores = before_after.score(reward, prompts, images[name], config.evaluate.images_per_prompt)
            found = before_after.measure(config, scores, clip, prompts, images[name])
        for key in ("reward", "oracle", "diversity"):
            values[f"{key}_{name}"] = found[key]
        values[f"entropy_{name}"] = open_entropy(images[name], config.evaluate.images_per_prompt)
    return values


def run(job, out, kind):
    """One run of the matrix, or what is left of it -> its rows of results.csv, one per stage."""
    config = configure(job, out, kind)
    stages, rows, loaded = config.schedule.stage_count, [], Models(config)
    for config.stage in range(stages):
        place = Run(config)
        if not (place.stage / "checkpoints").is_dir():
            run_stage(config, loaded=loaded)
        row = dict(zip(("algorithm", "method", "settings", "seed"), job.key(), strict=True))
        row |= {"stage": config.stage, **spent(place, config)}
        if evaluated(config):
            stored = place.stage / "evaluation.json"
            if not stored.exists():
                storage.write_json(stored, measure(config, averaged(config, place.checkpoint), loaded))
            row |= storage.read_json(stored, "the study")
        rows.append(row)
    return rows


def spent(place, config):
    """{column: value} from the metrics.jsonl of a Run: its cost up to and with stage config.stage, and its samples.

    queries: images scored; unet_evals: UNet evaluations; seconds: wall time; reward_samples, oracle_samples: means of
    the stage's own samples.
    """
    lines = [line for line in metrics.read(place.metrics) if line["stage"] <= config.stage]
    own = next(line for line in lines if line["stage"] == config.stage and line["step"] == "select")
    return {
        "queries": own["reward/queries"],
        "unet_evals": sum(line.get("perf/unet_evals", 0) for line in lines),
        "seconds": round(sum(line["time_s"] for line in lines), 1),
        "reward_samples": own["reward/mean"],
        "oracle_samples": own["oracle/alignment"],
    }


def main(out, kind, cells=(), seeds=(), changes=(), world="shapes"):
    """Run the matrix, and write the report into the folder `out` after every run that ends.

    Runs whose last stage is in out/results.csv are done. The others: see matrix. UserError for cells
    or seeds that the study cannot have, for refused settings, where another process works in `out`, and at the end
    where runs failed: the report has the others, and names these.
    """
    began = time.perf_counter()
    refuse(kind, cells, seeds)
    jobs = matrix(kind, cells, seeds, changes, world)
    config = configure(jobs[0], out, kind)
    lock.hold(out)
    base, rows, failed = base_figures(config, out / "base.json"), results.read(out / "results.csv"), []
    if rows:
        report.write(out, rows, base)
    left = unfinished(jobs, rows, out, kind)
    for number, (job, found) in enumerate(each(left, functools.partial(run, out=out, kind=kind)), 1):
        if isinstance(found, UserError):
            failed.append(f"{job.name()}: {found}")
            said = f"failed: {found}"
        else:
            rows += found
            said = f"{alignment(rows[-1])}; {(time.perf_counter() - began) / 60:.1f} min"
        print(f"{number}/{len(left)} {job.name()}: {said}", flush=True)
        if rows:
            report.write(out, rows, base, failed)
    if failed:
        raise UserError(f"{len(failed)} of {len(left)} runs failed; the report has the others, and names these")
    print((out / "table.md").read_text(encoding="utf-8"))


def refuse(kind, cells, seeds):
    """UserError for cells ("algorithm:method") that a kind of study does not have, and for seeds of a search."""
    known = list(dict.fromkeys(":".join(job[:2]) for job in matrix(kind)))
    if unknown := set(cells) - set(known):
        raise UserError(f"--rows {' '.join(sorted(unknown))}: must be of {' '.join(known)}")
    if kind == "search" and seeds:
        raise UserError("--seeds: the search has its own; without --search the rows take others")


def base_figures(config, path):
    """What measure finds for the base model, from the file `path`, which is written where it does not exist."""
    if not path.exists():
        print("evaluating the base model ...", flush=True)
        storage.write_json(path, measure(config, None, Models(config)))
    return storage.read_json(path, "the study")


def unfinished(jobs, rows, out, kind):
    """The jobs of which rows of results.csv have fewer stages than they are configured to run."""
    stages = collections.Counter((r["algorithm"], r["method"], r["settings"], r["seed"]) for r in rows)
    return [job for job in jobs if stages[job.key()] < configure(job, out, kind).schedule.stage_count]


def each(jobs, run):
    """(job, what run(job) gave) as the jobs end, in worker_pool, begun in their order.

    A run that diverged is a result too: its UserError is given, and the others go on.
    """
    with worker_pool() as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            try:
                yield futures[future], future.result()
            except UserError as error:
                yield futures[future], error


def worker_count():
    """One process per CPU core; with CUDA at most one for every 2 GiB free on the first GPU, where all of them run.

    A run of `shapes` takes 1.2 (docs/gpu.md).
    """
    import torch

    if not torch.cuda.is_available():
        return os.cpu_count()
    return max(1, min(os.cpu_count(), torch.cuda.mem_get_info()[0] // 2**31))


@contextlib.contextmanager
def worker_pool():
    """An executor with worker_count processes, each for many runs; an error ends them."""
    workers = worker_count()
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of the workers, which start after this
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield pool
        pool.shutdown()  # left to the interpreter's end it sometimes says that its pipe is gone
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise


def start_worker():
    """Prepare a worker: its output is its runs' log files, and it ends with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    processes.follow_parent()


def alignment(row):
    """The oracle's figures of a run's last row, in words."""
    return f"oracle {row['oracle_train']:.3f} train, {row['oracle_test']:.3f} held-out"
